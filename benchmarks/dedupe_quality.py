"""Which copies are found, and how many different pictures are taken for copies: by kind of edit, beside two peers.

    python benchmarks/dedupe_quality.py --quick
    python benchmarks/dedupe_quality.py --peers OTHER/bin/python     # a Python that has imagededup, data-juicer or both

Pictures are mosaics of two to four pieces of scikit-image's bundled photographs (of drawings where it is missing), no
two with the same pieces in the same places. Every one gets a copy by each edit. An edit's recall is the share of
(original, copy) pairs that a rule takes for copies; false pairs are of different originals.

    ours          near_duplicates as it stands: pHash within 8 bits, confirmed by the colour thumbnail
    hash alone    the same without the second look
    imagededup    PHash and find_duplicates, at most 10 bits: its default
    data-juicer   image_deduplicator, method phash: equal hashes, its only rule

Where a peer cannot be asked its documented rule is applied to imagehash.phash, and a line says so. The made-up world's
figures are printed beside them. False pairs are then turned into bounds for larger corpora (stages.false_pairs), which
also says what is assumed: the few photographs here are not the web.
"""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from harness import arguments, conclude, machine
from pipelines.demo.world import make_world
from pipelines.readers import discover, read
from pipelines.recipe import Input
from stages.dedupe import NearDuplicates
from stages.false_pairs import FalsePairs
from stages.hamming import iterate_pairs
from stages.hashing import grey_32, phash64, thumbnail

PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
    "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
# What a peer's own Python is asked: hashes of the files in a folder, by file name.
ASK = {
    "imagededup": """
from imagededup.methods import PHash
hashes = PHash(verbose=False).encode_images(image_dir=folder, num_enc_workers=0)
""",
    "data-juicer": """
from data_juicer.ops.deduplicator.image_deduplicator import ImageDeduplicator
operator = ImageDeduplicator(method="phash")
files = sorted(os.listdir(folder))
samples = {name: {"text": "", "images": [folder + "/" + name]} for name in files}
hashes = {name: operator.compute_hash(sample)["__dj__imagehash"] for name, sample in samples.items()}
""",
}
LEAST_RECALL = {"reencode q50": 0.99, "half size": 0.99, "brighter 20 %": 0.95, "crop 97 %": 0.9}
OURS = NearDuplicates()


def jpeg(picture: Image.Image, quality: int = 92) -> bytes:
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def cropped(picture: Image.Image, share: float) -> Image.Image:
    width, height = picture.size
    x, y = round(width * (1 - share) / 2), round(height * (1 - share) / 2)
    return picture.crop((x, y, width - x, height - y))


def marked(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    copy = picture.copy()
    copy.paste((235, 235, 235), (round(width * 0.72), round(height * 0.86), width, height))
    return copy


EDITS: dict[str, Callable[[Image.Image], bytes]] = {
    "reencode q50": lambda picture: jpeg(picture, 50),
    "half size": lambda picture: jpeg(
        picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
    ),
    "brighter 20 %": lambda picture: jpeg(picture.point(lambda value: min(255, round(value * 1.2)))),
    "crop 97 %": lambda picture: jpeg(cropped(picture, 0.97)),
    "crop 90 %": lambda picture: jpeg(cropped(picture, 0.90)),
    "corner mark": lambda picture: jpeg(marked(picture)),
    "white border": lambda picture: jpeg(ImageOps.expand(picture, round(picture.width * 0.06), (255, 255, 255))),
    "mirror": lambda picture: jpeg(ImageOps.mirror(picture)),
}


def photographs(rng: np.random.Generator) -> tuple[list[Image.Image], str]:
    """Large pictures to cut pieces from, and what they are."""
    spec = importlib.util.find_spec("skimage")
    folder = Path(spec.submodule_search_locations[0]) / "data" if spec and spec.submodule_search_locations else Path()
    found = [Image.open(folder / name).convert("RGB") for name in PHOTOGRAPHS if (folder / name).is_file()]
    if found:
        return found, f"{len(found)} bundled photographs of scikit-image"
    drawn = []
    for _ in range(15):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        drawn.append(coarse.resize((640, 480), Image.Resampling.BICUBIC))
    return drawn, "15 drawings (scikit-image is not installed)"


def mosaics(count: int, rng: np.random.Generator) -> tuple[list[Image.Image], str]:
    whole, what = photographs(rng)
    pieces = []
    for picture in whole:
        side = min(picture.size) // 2
        pieces += [
            picture.crop((x, y, x + side, y + side))
            for x in range(0, picture.width - side + 1, side)
            for y in range(0, picture.height - side + 1, side)
        ]
    made, seen = [], set()
    while len(made) < count:
        columns, rows = ((1, 2), (2, 1), (2, 2), (3, 1))[rng.integers(4)]
        chosen = tuple(rng.choice(len(pieces), columns * rows, replace=False).tolist())
        if (columns, rows, chosen) in seen:
            continue
        seen.add((columns, rows, chosen))
        width, height = int(rng.integers(256, 640)), int(rng.integers(256, 640))
        picture = Image.new("RGB", (width, height))
        for place, piece in enumerate(chosen):
            box_width, box_height = -(-width // columns), -(-height // rows)
            part = pieces[piece].resize((box_width, box_height), Image.Resampling.BICUBIC)
            picture.paste(part, ((place % columns) * box_width, (place // columns) * box_height))
        made.append(picture)
    return made, what


def measured(data: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) pHashes and (N, C) thumbnails, as the stage takes them."""
    greys, looks = [], []
    for one in data:
        picture = Image.open(io.BytesIO(one))
        greys.append(grey_32(picture))
        looks.append(np.frombuffer(thumbnail(picture), np.uint8))
    return phash64(greys), np.stack(looks)


def asked(python: str | None, peer: str, folder: Path, count: int) -> np.ndarray | None:
    """(N,) uint64 hashes that a peer's own code gives to the files 000000.jpg, ...; None where it cannot be asked."""
    if python is None:
        return None
    code = f"import json, os, sys\nfolder = sys.argv[1]\n{ASK[peer]}\nprint(json.dumps(hashes))"
    done = subprocess.run([python, "-c", code, str(folder)], capture_output=True, text=True, timeout=900)
    if done.returncode:
        print(f"  {peer} could not be asked: {(done.stderr.strip().splitlines() or ['no message'])[-1][:150]}")
        return None
    hashes: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return np.array([int(str(hashes[f"{number:06d}.jpg"]), 16) for number in range(count)], np.uint64)


def pairs_of(hashes: np.ndarray, looks: np.ndarray, radius: int, second_look: bool) -> set[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    for left, right, _ in iterate_pairs(hashes, radius):
        if second_look:
            same = OURS.looks_same(looks[left], looks[right])
            left, right = left[same], right[same]
        found.update(zip(left.tolist(), right.tolist(), strict=True))
    return found


def world_pairs(scenes: int, folder: Path) -> tuple[list[bytes], dict[tuple[int, int], str]]:
    """Files of a made-up world, and its planted near-duplicates: pair -> edit."""
    make_world(folder, scenes=scenes, seed=0, shard_size=10_000, flaw_rates={"near_duplicate": 0.2})
    data, keys = [], []
    for shard in discover(Input(url=str(folder / "*.tar"))):
        for sample in read(shard):
            if sample.data is not None:
                data.append(sample.data)
                keys.append(sample.key)
    truth = pq.read_table(folder / "truth.parquet").to_pylist()
    place = {key: number for number, key in enumerate(keys)}
    planted = {
        tuple(sorted((place[row["key"]], place[row["original_key"]]))): row["edit"]
        for row in truth
        if row["kind"] == "near_duplicate"
    }
    return data, planted


def main() -> None:
    options = arguments(__doc__, peers="a Python that has imagededup, data-juicer or both")
    print(machine("imagehash", "pillow"))
    rng = np.random.default_rng(0)
    originals, what = mosaics(150 if options.quick else 1000, rng)
    count = len(originals)
    # Copy e of original i stands at count * (e + 1) + i.
    data = [jpeg(picture) for picture in originals]
    for edit in EDITS.values():
        data += [edit(picture) for picture in originals]
    hashes, looks = measured(data)
    given: dict[str, tuple[np.ndarray, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        for number, one in enumerate(data):
            (Path(name) / f"{number:06d}.jpg").write_bytes(one)
        for peer in ASK:
            own = asked(options.peers, peer, Path(name), len(data))
            by_rule = f"{peer}'s documented rule, imagehash"
            given[peer] = (hashes, by_rule) if own is None else (own, f"{peer} itself")
    ways = {
        "ours": pairs_of(hashes, looks, OURS.radius, True),
        "hash alone": pairs_of(hashes, looks, OURS.radius, False),
        "imagededup": pairs_of(given["imagededup"][0], looks, 10, False),
        "data-juicer": pairs_of(given["data-juicer"][0], looks, 0, False),
    }
    print(
        f"{count} mosaics of {what}, {len(EDITS)} copies of each; {given['imagededup'][1]}; {given['data-juicer'][1]}"
    )
    print(f"{'recall':<16}" + "".join(f"{way:>14}" for way in ways))
    recall: dict[tuple[str, str], float] = {}
    for place, edit in enumerate(EDITS):
        for way, pairs in ways.items():
            hits = sum((i, count * (place + 1) + i) in pairs for i in range(count))
            recall[way, edit] = hits / count
        print(f"{edit:<16}" + "".join(f"{recall[way, edit]:>14.3f}" for way in ways))
    false = {way: sum(a % count != b % count for a, b in pairs) for way, pairs in ways.items()}
    share = {way: 1 - false[way] / max(1, len(pairs)) for way, pairs in ways.items()}
    print(f"{'pair precision':<16}" + "".join(f"{share[way]:>14.4f}" for way in ways))
    print(f"{'false pairs':<16}" + "".join(f"{false[way]:>14,}" for way in ways))

    # Pairs of different originals alone: their copies would count the same chance nine times over.
    looked_at = count * (count - 1) // 2
    print(f"\nbounds (95 %) from {looked_at:,} pairs of different originals, for one true copy in ten rows:")
    print(f"{'':<16}{'false':>7}{'rate at most':>14}{'false at 10 M':>15}{'precision >=':>14}{'rows for 0.99':>15}")
    for way, pairs in ways.items():
        bound = FalsePairs(sum(b < count for _, b in pairs), looked_at)
        print(
            f"{way:<16}{bound.found:>7}{bound.rate_at_most():>14.2e}{bound.expected_at_most(10**7):>15.2e}"
            f"{bound.precision_at_least(10**7, 0.1):>14.2e}{bound.rows_with_precision(0.99, 0.1):>15,.0f}"
        )
    print(
        "a bound, not a rate: with more different pictures looked at and none found it falls, threefold for threefold"
    )

    with tempfile.TemporaryDirectory() as name:
        pictures, planted = world_pairs(300 if options.quick else 3000, Path(name))
        opened = [n for n, one in enumerate(pictures) if _opens(one)]
        place = {number: row for row, number in enumerate(opened)}
        world_hashes, world_looks = measured([pictures[number] for number in opened])
    in_world = {
        "ours": pairs_of(world_hashes, world_looks, OURS.radius, True),
        "hash alone": pairs_of(world_hashes, world_looks, OURS.radius, False),
        "imagededup": pairs_of(world_hashes, world_looks, 10, False),
        "data-juicer": pairs_of(world_hashes, world_looks, 0, False),
    }
    exact = {tuple(sorted(pair)) for pair in _equal_bytes([pictures[number] for number in opened])}
    print(f"\nmade-up world: {len(opened):,} pictures; imagehash's bits for all four rules")
    for edit in sorted(set(planted.values())):
        mine = [tuple(sorted((place[a], place[b]))) for (a, b), kind in planted.items() if kind == edit]
        print(
            f"{edit:<16}"
            + "".join(f"{np.mean([pair in pairs for pair in mine]):>14.3f}" for pairs in in_world.values())
        )
    known = {tuple(sorted((place[a], place[b]))) for a, b in planted} | exact
    wrong = {way: len(pairs - known) for way, pairs in in_world.items()}
    print(f"{'false pairs':<16}" + "".join(f"{wrong[way]:>14,}" for way in in_world))

    found = float(np.mean([recall["ours", edit] for edit in EDITS]))
    peer = float(np.mean([recall["data-juicer", edit] for edit in EDITS]))
    holds = all(recall["ours", edit] >= least for edit, least in LEAST_RECALL.items())
    conclude(
        claim="near_duplicates finds re-encoded, halved, brightened and slightly cropped copies, and hardly others",
        value=found,
        unit="mean recall over the edits",
        limit=", ".join(f"{edit} >= {least}" for edit, least in LEAST_RECALL.items()) + "; pair precision >= 0.99",
        peer=f"{given['data-juicer'][1]}: {peer:.3f}",
        ratio=found / max(peer, 1e-9),
        holds=holds and share["ours"] >= 0.99,
        pair_precision=round(share["ours"], 5),
        pair_precision_imagededup=round(share["imagededup"], 5),
        false_pairs_world=wrong["ours"],
    )


def _opens(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).load()
    except Exception:  # decoders raise whatever they like on damaged input
        return False
    return True


def _equal_bytes(pictures: list[bytes]) -> list[tuple[int, int]]:
    first: dict[bytes, list[int]] = {}
    for number, data in enumerate(pictures):
        first.setdefault(data, []).append(number)
    return [(a, b) for same in first.values() for i, a in enumerate(same) for b in same[i + 1 :]]


if __name__ == "__main__":
    main()
