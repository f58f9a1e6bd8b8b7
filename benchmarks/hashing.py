"""Exact perceptual hashes: one decode for every measure of a pass and one DCT a batch, against imagehash.

    python benchmarks/hashing.py --quick

First the bits: pictures of every mode that opens, at sizes from 1x1 up, in batches of 1, 7 and all, must get the hash
that imagehash.phash gives. Then the time from encoded bytes to size, mode, hash and thumbnail, on one core:

    one pass        stages.decode and stages.hashing on one Batch: each picture is decoded once
    separately      the same columns, each measure opening the bytes for itself, pHash by imagehash, picture by picture
    imagehash only  the same single decode as ours, pHash by imagehash: what the batched DCT alone is worth

Most of the time is libjpeg's and Pillow's Lanczos filter, which exact bits need: sharing the decode is what pays.
Decoded pictures of a whole batch wait in memory for the next measure, perhaps outside the processor's caches: the last
line shows what the size of a batch costs.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import imagehash
import numpy as np
from PIL import Image

from harness import arguments, conclude, core_hours_per_million, least_cpu_seconds, machine
from pipelines.recipe import EngineOptions
from stages.contract import Batch, Context
from stages.decode import Decode, EncodedImage
from stages.hashing import PerceptualHash, thumbnail

LEAST_RATIO = 1.25
PICTURES = 64
BATCH = EngineOptions().transport_batch  # what a run uses unless it is told otherwise


def encoded(picture: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth colour, edges and sensor noise: about as hard to decode and to hash as a photograph."""
    coarse = np.clip(rng.normal(128, 60, (9, 12, 3)), 0, 255).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = smooth + rng.normal(0, 6, (height, width, 3)).astype(np.int16)
    noisy[height // 3 :, : width // 4] //= 2
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def odd_pictures(rng: np.random.Generator) -> list[bytes]:
    """Every mode and shape on which two ways to a hash might part: alpha, palettes, 16 bits, flat, tiny, very wide."""
    found = []
    for width, height in ((1, 1), (3, 2), (31, 33), (32, 32), (300, 7), (97, 160)):
        base = photograph(rng, width, height)
        found += [encoded(base.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
        found += [encoded(base.convert(mode), "JPEG", quality=80) for mode in ("L", "RGB", "CMYK")]
        found += [encoded(base, "WEBP"), encoded(base, "GIF"), encoded(base, "TIFF"), encoded(base, "PPM")]
    # Coefficients that tie with their median: flat, half and half, checkers, ramps.
    y_YX, x_YX = np.mgrid[0:64, 0:64]
    drawn = [np.full((64, 64), level) for level in (0, 1, 127, 255)]
    drawn += [x_YX * 4, y_YX * 4, (x_YX // 32) * 255, ((x_YX // 8 + y_YX // 8) % 2) * 255, x_YX * y_YX // 16]
    return found + [encoded(Image.fromarray(pixels_YX.astype(np.uint8)), "PNG") for pixels_YX in drawn]


def one_pass(data: list[bytes], batch_size: int = BATCH) -> list[int]:
    """Hashes by the stages, as a worker runs them: one Batch, one decode a picture, every measure in turn."""
    measures = [Decode().open(Context()), PerceptualHash().open(Context())]
    hashes: list[int] = []
    for start in range(0, len(data), batch_size):
        part = data[start : start + batch_size]
        batch = Batch({"uid": [""] * len(part)}, [EncodedImage(one) for one in part])
        for measure in measures:
            answer = measure(batch)
        hashes += answer.values["phash64"]
    return hashes


def separately(data: list[bytes]) -> list[int]:
    """The same columns the common way: every measure opens the file for itself."""
    hashes = []
    for one in data:
        Image.open(io.BytesIO(one)).load()  # decodes at all? size, mode, format
        hashes.append(int(str(imagehash.phash(Image.open(io.BytesIO(one)))), 16))
        thumbnail(Image.open(io.BytesIO(one)))
    return hashes


def imagehash_only(data: list[bytes]) -> list[int]:
    """One decode, as ours, but pHash by imagehash."""
    hashes = []
    for one in data:
        picture = Image.open(io.BytesIO(one))
        picture.load()
        hashes.append(int(str(imagehash.phash(picture)), 16))
        thumbnail(picture)
    return hashes


def differing_bits(rng: np.random.Generator, photographs: int) -> tuple[int, int]:
    """(pictures checked, pictures whose hash is not imagehash's in some batch size)."""
    shapes = [tuple(rng.integers(16, 400, 2)) for _ in range(photographs)]
    data = odd_pictures(rng) + [encoded(photograph(rng, int(w), int(h)), "JPEG") for w, h in shapes]
    truth = [int(str(imagehash.phash(Image.open(io.BytesIO(one)))), 16) for one in data]
    answers = [one_pass(data, size) for size in (1, 7, len(data))]
    return len(data), sum(any(answer[row] != truth[row] for answer in answers) for row in range(len(data)))


def main() -> None:
    options = arguments(__doc__)
    rng = np.random.default_rng(0)
    print(machine("imagehash", "pillow", "numpy", "scipy"))

    checked, wrong = differing_bits(rng, photographs=200 if options.quick else 2000)
    print(f"bits: {checked - wrong} of {checked} pictures have imagehash's hash")
    claim = f"one pass gives size, thumbnail and imagehash's bits {LEAST_RATIO} times as fast as separate measures"
    limit = f"every bit equal; ratio >= {LEAST_RATIO} at 512x384"
    if wrong:
        peer = "imagehash: not timed, because bits differ"
        conclude(claim=claim, value=0, unit="images/s", limit=limit, peer=peer, ratio=None, holds=False)

    contestants: dict[str, Callable[[list[bytes]], list[int]]] = {
        "one pass": one_pass,
        "imagehash only": imagehash_only,
        "separately": separately,
    }
    rounds = 5 if options.quick else 15
    sizes = ((128, 96), (256, 192), (512, 384)) if options.quick else ((128, 96), (256, 192), (512, 384), (1024, 768))
    rates: dict[tuple[str, tuple[int, int]], float] = {}
    print(f"{'pixels':>10}  {'way':<15}{'images/s a core':>16}{'core hours a million':>22}{'one pass is':>13}")
    for size in sizes:
        data = [encoded(photograph(rng, *size), "JPEG", quality=90) for _ in range(PICTURES)]
        runs = {name: (lambda run=run, data=data: run(data)) for name, run in contestants.items()}
        seconds = least_cpu_seconds(runs, rounds)
        for name in contestants:
            rate = rates[name, size] = len(data) / seconds[name]
            times = seconds[name] / seconds["one pass"]
            width_height = f"{size[0]}x{size[1]}"
            print(f"{width_height:>10}  {name:<15}{rate:>16.0f}{core_hours_per_million(rate):>22.3f}{times:>12.2f}x")

    data = [encoded(photograph(rng, 512, 384), "JPEG", quality=90) for _ in range(PICTURES)]
    batches = {str(size): (lambda size=size: one_pass(data, size)) for size in (1, 4, 16, 64)}
    seconds = least_cpu_seconds(batches, rounds)
    shown = ", ".join(f"{PICTURES / seconds[name]:.0f} in batches of {name}" for name in batches)
    print(f"512x384, one pass, images/s a core: {shown}")

    ours, theirs = rates["one pass", (512, 384)], rates["separately", (512, 384)]
    conclude(
        claim=claim,
        value=ours,
        unit="images/s a core",
        limit=limit,
        peer=f"imagehash {imagehash.__version__}, a decode for each measure: {theirs:.4g} images/s a core",
        ratio=ours / theirs,
        holds=ours / theirs >= LEAST_RATIO,
        core_hours_per_million=round(core_hours_per_million(ours), 3),
    )


if __name__ == "__main__":
    main()
