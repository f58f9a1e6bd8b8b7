"""A made-up world: drawn scenes with truthful captions, planted flaws and a table that says where every flaw is.

    from pipelines.demo.world import make_world
    summary = make_world("world", scenes=4000, seed=0)

writes img2dataset-style WebDataset shards (`00000.tar` with `KEY.jpg|png`, `KEY.txt`, `KEY.json`, beside it
`00000_stats.json`) and `truth.parquet`. Nothing inside the shards betrays a flaw; only the truth table does.

A scene is one or two coloured shapes on a light, softly varied background. Shapes and colours are few and far apart, so
that a small diffusion model can draw them at 32x32 and a reader of pixels (pipelines.demo.checker) can tell them apart:
every colour has one channel near 40 where the background never falls below about 180. The background (gradient, tint
and texture) is unique to each picture: pictures of alike scenes differ in a small colour thumbnail even where their
perceptual hashes happen to collide.

Same seed and library versions: the same bytes. Every random draw has a generator seeded by (seed, purpose, scene).
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# The channel that an object lacks is near 40 for every colour (see the module docstring).
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (40, 80, 225),
    "yellow": (250, 205, 40),
    "purple": (150, 45, 185),
    "cyan": (40, 195, 215),
    "black": (40, 40, 40),
}
SHAPES = ("circle", "square", "triangle")
SIZES: dict[str, float] = {"large": 0.40, "small": 0.28}  # diameter of the circle, as a fraction of the shorter side
# In diameters. A square holds the whole circle of its size, so that at 32 pixels the two differ in more than corners.
SQUARE_SIDE = 1.12
TRIANGLE_SIDE = 1.2
RELATIONS = ("above", "below", "left of", "right of")
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

KINDS = (
    "clean",
    "byte_duplicate",
    "near_duplicate",
    "swapped_caption",
    "swapped_attributes",
    "swapped_relation",
    "boilerplate",
    "too_small",
    "corrupt",
    "truncated",
    "ugly",
)
EDITS = ("reencode", "resize", "crop", "brighten")
# Rows of each flaw as a fraction of `scenes`. Duplicates are added rows; every other flaw spoils a scene's only row.
FLAW_RATES: dict[str, float] = {
    "byte_duplicate": 0.03,
    "near_duplicate": 0.06,
    "swapped_caption": 0.05,
    "swapped_attributes": 0.03,
    "swapped_relation": 0.03,
    "boilerplate": 0.03,
    "too_small": 0.02,
    "corrupt": 0.015,
    "truncated": 0.015,
    "ugly": 0.05,
}
BOILERPLATE = (
    "image",
    "untitled",
    "stock photo",
    "click here to enlarge",
    "click to enlarge image",
    "IMG_2041.JPG",
    "DSC00318.jpg",
    "photo credit: getty images",
    "© 2014 all rights reserved",
    "free shipping on all orders over $50",
    "download this wallpaper in HD for free",
    "https://example.org/pictures/0001.jpg",
)

# Pictures of two scenes closer than both of these could be taken for one; `make_world` draws such a picture again.
ALIKE_BITS = 10  # of a 64-bit pHash
ALIKE_LOOK = 0.05  # mean absolute difference (0..1) of 8x8 colour thumbnails, brightness fitted

TRUTH_SCHEMA_VERSION = "1.0"


@dataclass(frozen=True)
class Thing:
    """One drawn object."""

    colour: str
    shape: str
    size: str


@dataclass(frozen=True)
class Scene:
    """One thing, or two of different colours with `relation` said of the first: things[0] is <relation> things[1]."""

    things: tuple[Thing, ...]
    relation: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Scene:
        data = json.loads(text)
        return cls(tuple(Thing(**thing) for thing in data["things"]), data["relation"])

    def with_colours_exchanged(self) -> Scene:
        """The scene that a caption with swapped attributes would describe."""
        first, second = self.things
        return Scene(
            (replace(first, colour=second.colour), replace(second, colour=first.colour)),
            self.relation,
        )

    def with_relation_reversed(self) -> Scene:
        """The scene that a caption with the opposite relation would describe."""
        assert self.relation is not None
        return Scene(self.things, OPPOSITE[self.relation])


@dataclass(frozen=True)
class WorldSummary:
    """What `make_world` wrote. counts: rows by kind; edits: near-duplicates by edit."""

    folder: Path
    seed: int
    scenes: int
    rows: int
    shards: tuple[Path, ...]
    truth: Path
    counts: dict[str, int]
    edits: dict[str, int]


# --- scenes and captions ---------------------------------------------------------------------------------------------


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random scene; three in five have two things."""
    colours = rng.permutation(list(COLOURS))
    things = tuple(
        Thing(str(colours[i]), SHAPES[rng.integers(len(SHAPES))], tuple(SIZES)[rng.integers(len(SIZES))])
        for i in range(2)
    )
    relation = RELATIONS[rng.integers(len(RELATIONS))]
    return Scene(things, relation) if rng.random() < 0.6 else Scene(things[:1])


def prompts(n: int, seed: int) -> list[tuple[str, Scene]]:
    """`n` plainly worded prompts with the scene each asks for; distinct while there are enough distinct scenes."""
    rng = np.random.default_rng([seed, 71])
    found: dict[str, Scene] = {}
    for _ in range(50 * n):
        scene = sample_scene(rng)
        found.setdefault(plain_caption(scene), scene)
        if len(found) == n:
            break
    pairs = list(found.items())
    return [pairs[i % len(pairs)] for i in range(n)]


def plain_caption(scene: Scene) -> str:
    """The full and plain wording: "a large red circle above a small blue square"."""
    phrases = [f"a {thing.size} {thing.colour} {thing.shape}" for thing in scene.things]
    if scene.relation is None:
        return phrases[0]
    return f"{phrases[0]} {_spoken(scene.relation, to_the=True)} {phrases[1]}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many truthful wordings: either thing first, synonyms for sizes, sizes left out now and then."""
    if scene.relation is not None and rng.random() < 0.4:
        scene = Scene(scene.things[::-1], OPPOSITE[scene.relation])
    with_sizes = rng.random() < 0.8
    sizes = [{"large": ("large", "big"), "small": ("small", "little")}[thing.size] for thing in scene.things]
    words = [options[int(rng.random() < 0.35)] if with_sizes else "" for options in sizes]
    phrases = [
        " ".join(["a", word, thing.colour, thing.shape]).replace("  ", " ")
        for word, thing in zip(words, scene.things, strict=True)
    ]
    if scene.relation is None:
        patterns = ["{}", "{}", "a drawing of {}", "there is {}", "a picture of {}", "{} on a light background"]
        text = patterns[rng.integers(len(patterns))].format(phrases[0])
    else:
        relation = _spoken(scene.relation, to_the=rng.random() < 0.7)
        patterns = ["{} {} {}", "{} {} {}", "{} is {} {}", "a drawing of {} {} {}", "there is {} {} {}"]
        text = patterns[rng.integers(len(patterns))].format(phrases[0], relation, phrases[1])
    style = rng.random()
    if style < 0.25:
        text = text[0].upper() + text[1:] + "."
    elif style < 0.35:
        text = text[0].upper() + text[1:]
    return text


def _spoken(relation: str, to_the: bool) -> str:
    return f"to the {relation}" if to_the and relation.endswith("of") else relation


# --- drawing ---------------------------------------------------------------------------------------------------------


def coverage(shape: str, height: int, width: int, cx: float, cy: float, diameter: float) -> np.ndarray:
    """How much of each pixel a shape covers: float32 (height, width) in 0..1, anti-aliased by its signed distance.

    cx, cy and diameter in pixels, pixel (i, j) being centred on (j + 0.5, i + 0.5). (cx, cy) is the centroid for every
    shape; SQUARE_SIDE and TRIANGLE_SIDE are in diameters.
    """
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    x, y = x - cx, y - cy
    if shape == "circle":
        distance = np.hypot(x, y) - diameter / 2
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - SQUARE_SIDE / 2 * diameter
    elif shape == "triangle":
        # Equilateral, point up: three half-planes at the inradius from the centroid.
        inradius = TRIANGLE_SIDE * diameter / (2 * np.sqrt(3))
        distance = np.maximum(y, np.sqrt(0.75) * np.abs(x) - 0.5 * y) - inradius
    else:
        raise ValueError(f"unknown shape {shape!r}: expected one of {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def shape_area(shape: str, diameter: float) -> float:
    """Area in square pixels of a shape of that diameter."""
    factor = {"circle": np.pi / 4, "square": SQUARE_SIDE**2, "triangle": np.sqrt(3) / 4 * TRIANGLE_SIDE**2}[shape]
    return float(factor * diameter**2)


def background(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A light background, float32 (height, width, 3): a gradient between two tints and a soft texture of cells."""
    tints = rng.uniform(186, 242, size=(2, 3)).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    along = (x / width - 0.5) * np.cos(angle) + (y / height - 0.5) * np.sin(angle) + 0.5
    along = np.clip(along, 0, 1)[..., None]
    picture = tints[0] * (1 - along) + tints[1] * along
    # Cells no finer than the 8x8 DCT block of a pHash: bits that only the texture decides are then decided firmly.
    for cells, strength in ((4, 7.0), (7, 6.0)):
        grid = rng.normal(0, strength, size=(cells, cells, 3)).astype(np.float32)
        grid += rng.normal(0, strength, size=(cells, cells, 1)).astype(np.float32)
        planes = [
            np.asarray(Image.fromarray(grid[..., channel]).resize((width, height), Image.Resampling.BICUBIC))
            for channel in range(3)
        ]
        picture = picture + np.stack(planes, axis=-1)
    return np.clip(picture, 176, 255).astype(np.float32)


def layout(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre x, y and diameter of each thing, in units of the central square's side."""
    diameters = [SIZES[thing.size] * rng.uniform(0.94, 1.06) for thing in scene.things]
    if scene.relation is None:
        reach = 0.5 * (0.46 - 0.6 * diameters[0])
        return [(0.5 + rng.uniform(-reach, reach), 0.5 + rng.uniform(-reach, reach), diameters[0])]
    # The relation that is said must be the one that is seen: far less apart sideways than along it.
    across = [0.5 + rng.uniform(-0.5, 0.5) * (0.44 - 0.6 * diameter) for diameter in diameters]
    along = [0.25 + rng.uniform(-0.01, 0.01), 0.75 + rng.uniform(-0.01, 0.01)]
    if scene.relation in ("below", "right of"):
        along = along[::-1]
    if scene.relation in ("above", "below"):
        return [(a, b, d) for a, b, d in zip(across, along, diameters, strict=True)]
    return [(b, a, d) for a, b, d in zip(across, along, diameters, strict=True)]


def draw(scene: Scene, size: int | tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB picture of `size` pixels (a side, or width and height); things lie in the central square."""
    width, height = (size, size) if isinstance(size, int) else size
    side = min(width, height)
    picture = background(height, width, rng)
    for thing, (cx, cy, diameter) in zip(scene.things, layout(scene, rng), strict=True):
        # Things are placed by the middle of their height, which in a triangle lies above the centroid.
        drop = TRIANGLE_SIDE * diameter / (4 * np.sqrt(3)) if thing.shape == "triangle" else 0.0
        cover = coverage(
            thing.shape,
            height,
            width,
            cx * side + (width - side) / 2,
            (cy + drop) * side + (height - side) / 2,
            diameter * side,
        )[..., None]
        colour = np.array(COLOURS[thing.colour], np.float32) + rng.uniform(-6, 6, size=3).astype(np.float32)
        picture = picture * (1 - cover) + colour * cover
    return Image.fromarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8))


def spoil(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """An ugly version: washed out towards a grey, or buried in noise. What it shows stays what its caption says."""
    pixels: np.ndarray = np.asarray(picture, np.float32)
    if rng.random() < 0.5:
        grey = rng.uniform(150, 225)
        keep = rng.uniform(0.12, 0.25)
        pixels = grey + (pixels - grey) * keep + rng.normal(0, 2, size=pixels.shape)
    else:
        pixels = pixels + rng.normal(0, rng.uniform(55, 85), size=pixels.shape)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def edited(picture: Image.Image, edit: str, rng: np.random.Generator) -> Image.Image:
    """A near-duplicate: resized, slightly cropped or brightened; "reencode" leaves the pixels to the encoder."""
    width, height = picture.size
    if edit == "reencode":
        return picture
    if edit == "resize":
        factor = rng.uniform(0.6, 0.9)
        return picture.resize((round(width * factor), round(height * factor)), Image.Resampling.LANCZOS)
    if edit == "crop":
        left, top, right, bottom = (max(1, round(side * rng.uniform(0.0, 0.022))) for side in (width, height) * 2)
        return picture.crop((left, top, width - right, height - bottom))
    if edit == "brighten":
        pixels = np.asarray(picture, np.float32) * rng.uniform(1.03, 1.10)
        return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    raise ValueError(f"unknown edit {edit!r}: expected one of {', '.join(EDITS)}")


def encode(picture: Image.Image, extension: str, quality: int = 92) -> bytes:
    """Encoded bytes of a picture, "jpg" or "png"."""
    stream = io.BytesIO()
    if extension == "png":
        picture.save(stream, "PNG")
    else:
        picture.save(stream, "JPEG", quality=quality, subsampling=0)
    return stream.getvalue()


def picture_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height of a scene's picture: a side of 96..160, one in four wider or taller."""
    side = 8 * int(rng.integers(12, 21))
    longer = 8 * round(side * float(rng.uniform(1.1, 1.3)) / 8)
    kind = rng.random()
    return (longer, side) if kind < 0.125 else (side, longer) if kind < 0.25 else (side, side)


# --- flaws -----------------------------------------------------------------------------------------------------------


def garble(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes that no decoder opens: everything, or everything behind the magic number, overwritten with noise."""
    keep = 4 if rng.random() < 0.5 else 0
    while True:
        garbled = data[:keep] + rng.bytes(len(data) - keep)
        if not _opens(garbled):
            return garbled


def cut_short(data: bytes, rng: np.random.Generator) -> bytes:
    """The first part of a file, as a broken download leaves it; long enough that its header is whole."""
    return data[: int(len(data) * rng.uniform(0.4, 0.8))]


def _opens(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).load()
    except Exception:  # any decoder error will do: the question is only whether it opens
        return False
    return True


def _told_apart(first: Scene, second: Scene) -> bool:
    """True if a caption of one is false of the other whatever its wording: they show other things."""
    return {(t.colour, t.shape) for t in first.things} != {(t.colour, t.shape) for t in second.things}


@dataclass(frozen=True)
class _Row:
    scene_id: int
    kind: str
    data: bytes
    extension: str
    caption: str
    true_caption: str
    scene: Scene
    size: tuple[int, int]
    edit: str | None = None
    original: int | None = None  # scene_id of the row that it copies


def _generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    return np.random.default_rng([seed, *purpose.encode(), *numbers])


def make_world(
    folder: str | Path,
    scenes: int = 4000,
    seed: int = 0,
    shard_size: int = 500,
    flaw_rates: Mapping[str, float] | None = None,
) -> WorldSummary:
    """Write a world of `scenes` distinct scenes and the duplicates of some; see the module docstring.

    flaw_rates: rows of a flaw as a fraction of `scenes`, over the defaults in FLAW_RATES; 0 leaves a flaw out.
    Raises ValueError for an unknown flaw or rates that leave too few clean scenes.
    """
    unknown = sorted(set(flaw_rates or {}) - set(FLAW_RATES))
    if unknown:
        raise ValueError(f"make_world: unknown flaw {unknown[0]!r}; expected any of {', '.join(FLAW_RATES)}")
    counts = {kind: round(rate * scenes) for kind, rate in {**FLAW_RATES, **(flaw_rates or {})}.items()}
    if sum(counts.values()) > scenes:
        raise ValueError(f"make_world: {sum(counts.values())} flawed rows do not fit {scenes} scenes; lower flaw_rates")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [sample_scene(_generator(seed, "scene", i)) for i in range(scenes)]
    kinds, copies, donors = _plan(drawn, counts, seed)

    rows = _distinct_rows(lambda i, attempt: _scene_row(i, drawn, kinds[i], donors.get(i), seed, attempt), scenes)
    for number, (original, edit) in enumerate(copies):
        rows.append(_copy_row(rows[original], edit, scenes + number, seed))
    rows = _shuffled(rows, seed)
    return _write(folder, rows, scenes, seed, shard_size)


def _plan(
    drawn: Sequence[Scene], counts: Mapping[str, int], seed: int
) -> tuple[list[str], list[tuple[int, str | None]], dict[int, int]]:
    """Kind of each scene's row; copies to make as (scene, edit or None); whose caption a swapped caption takes."""
    rng = _generator(seed, "plan")
    kinds = ["clean"] * len(drawn)
    order = [int(i) for i in rng.permutation(len(drawn))]
    paired = [i for i in order if drawn[i].relation is not None]
    for kind in ("swapped_attributes", "swapped_relation"):
        for _ in range(counts[kind]):
            if not paired:
                raise ValueError(f"make_world: too few scenes with two things for {counts[kind]} rows of {kind}")
            kinds[paired.pop()] = kind
    free = [i for i in order if kinds[i] == "clean"]
    for kind in ("boilerplate", "too_small", "corrupt", "truncated", "ugly", "swapped_caption"):
        for _ in range(counts[kind]):
            kinds[free.pop()] = kind
    # Captions go round in pairs: a takes b's and b takes a's; an odd one out takes the first's.
    swapped = [i for i in order if kinds[i] == "swapped_caption"]
    donors = _donors(swapped, drawn)
    copies: list[tuple[int, str | None]] = [(free.pop(), None) for _ in range(counts["byte_duplicate"])]
    copies += [(free.pop(), EDITS[n % len(EDITS)]) for n in range(counts["near_duplicate"])]
    return kinds, copies, donors


def _donors(swapped: list[int], drawn: Sequence[Scene]) -> dict[int, int]:
    donors: dict[int, int] = {}
    waiting = list(swapped)
    while waiting:
        first = waiting.pop()
        partner = next((i for i in reversed(waiting) if _told_apart(drawn[first], drawn[i])), None)
        if partner is None:  # nobody left to exchange with: borrow any false caption
            donors[first] = next(i for i in range(len(drawn)) if _told_apart(drawn[first], drawn[i]))
            continue
        waiting.remove(partner)
        donors[first], donors[partner] = partner, first
    return donors


def _distinct_rows(make: Callable[[int, int], _Row], count: int) -> list[_Row]:
    """Rows make(i, attempt) for i < count, a picture being drawn again while it could pass for an earlier one.

    Two alike scenes (or washed-out ones) may by chance come out as one picture to any reader of hashes and thumbnails:
    such a pair would be no planted flaw but an ambiguous truth. "Could pass" is drawn wider than any sensible dedupe.
    """
    rows = [make(i, 0) for i in range(count)]
    seen = [_signature(row) for row in rows]
    hashes = np.array([signature[0] for signature in seen], np.uint64)
    looks = np.stack([signature[1] for signature in seen])
    opens = np.array([signature[2] for signature in seen], bool)
    attempt = 0
    pending = list(range(count))
    while True:
        again = []
        for i in pending:
            if not opens[i]:
                continue
            # On the first round every earlier row, later on any other row.
            others = np.arange(i if attempt == 0 else count)
            near = others[(np.bitwise_count(hashes[others] ^ hashes[i]) <= ALIKE_BITS) & opens[others] & (others != i)]
            if len(near) and look_distance(looks[near], looks[i]).min() < ALIKE_LOOK:
                again.append(i)
        if not again:
            return rows
        attempt += 1
        if attempt > 50:
            raise ValueError(f"make_world: {len(again)} of {count} pictures stay alike; ask for fewer scenes")
        for i in again:
            rows[i] = make(i, attempt)
            hashes[i], looks[i], opens[i] = _signature(rows[i])
        pending = again


def _signature(row: _Row) -> tuple[np.uint64, np.ndarray, bool]:
    """pHash by imagehash, 8x8 RGB thumbnail (192,) in 0..1, and whether the row has a picture at all."""
    import imagehash

    if row.kind in ("corrupt", "truncated"):
        return np.uint64(0), np.zeros(192, np.float32), False
    picture = Image.open(io.BytesIO(row.data)).convert("RGB")
    bits = imagehash.phash(picture).hash.ravel()
    small = np.asarray(picture.resize((8, 8), Image.Resampling.BOX), np.float32).ravel() / 255
    return np.packbits(bits).view(">u8")[0].astype(np.uint64), small, True


def look_distance(looks: np.ndarray, look: np.ndarray) -> np.ndarray:
    """(N,) mean absolute difference (0..1) between thumbnails (N, C) and one (C,), after the gain that fits best."""
    gain = (looks @ look) / np.maximum((looks * looks).sum(1), 1e-6)
    return np.abs(looks * gain[:, None] - look).mean(1)


def _scene_row(i: int, drawn: Sequence[Scene], kind: str, donor: int | None, seed: int, attempt: int) -> _Row:
    scene = drawn[i]
    rng = _generator(seed, "picture", i, attempt)
    words = _generator(seed, "words", i)
    true_caption = caption(scene, words)
    text = true_caption
    size = picture_size(rng)
    if kind == "too_small":
        size = (24, 24)
    picture = draw(scene, size, rng)
    if kind == "ugly":
        picture = spoil(picture, rng)
    extension = "png" if rng.random() < 0.05 else "jpg"
    data = encode(picture, extension, quality=int(rng.integers(88, 96)))
    if kind == "corrupt":
        data = garble(data, rng)
    elif kind == "truncated":
        data = cut_short(data, rng)
    elif kind == "boilerplate":
        text = BOILERPLATE[words.integers(len(BOILERPLATE))]
    elif kind == "swapped_caption":
        assert donor is not None
        text = caption(drawn[donor], _generator(seed, "words", donor))
    elif kind == "swapped_attributes":
        text = caption(scene.with_colours_exchanged(), words)
    elif kind == "swapped_relation":
        text = caption(scene.with_relation_reversed(), words)
    return _Row(i, kind, data, extension, text, true_caption, scene, picture.size)


def _copy_row(original: _Row, edit: str | None, number: int, seed: int) -> _Row:
    """A byte duplicate (edit None) or a near-duplicate, with the original's caption or another true wording.

    Edited copies never have more bytes at equal pixels, so the original is the one that keeper order (most pixels, then
    most bytes) keeps.
    """
    rng = _generator(seed, "copy", number)
    text = original.caption if rng.random() < 0.5 else caption(original.scene, rng)
    if edit is None:
        return replace(original, kind="byte_duplicate", caption=text, true_caption=text, original=original.scene_id)
    picture = edited(Image.open(io.BytesIO(original.data)).convert("RGB"), edit, rng)
    quality = int(rng.integers(60, 86))
    data = encode(picture, "jpg", quality)
    while len(data) >= len(original.data):
        quality -= 5
        data = encode(picture, "jpg", quality)
    return replace(
        original,
        kind="near_duplicate",
        data=data,
        extension="jpg",
        caption=text,
        true_caption=text,
        size=picture.size,
        edit=edit,
        original=original.scene_id,
    )


def _shuffled(rows: list[_Row], seed: int) -> list[_Row]:
    """Rows in random order, except that a byte duplicate never comes before the row it copies: which of the two is the
    original is a matter of order alone."""
    shuffled = [rows[i] for i in _generator(seed, "order").permutation(len(rows))]
    place = {(row.scene_id, row.kind): position for position, row in enumerate(shuffled)}
    for row in rows:
        if row.kind == "byte_duplicate":
            here, there = place[(row.scene_id, row.kind)], place[(row.scene_id, "clean")]
            if here < there:
                shuffled[here], shuffled[there] = shuffled[there], shuffled[here]
    return shuffled


# --- files -----------------------------------------------------------------------------------------------------------


def _write(folder: Path, rows: Sequence[_Row], scenes: int, seed: int, shard_size: int) -> WorldSummary:
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = [f"{n // shard_size:05d}{n % shard_size:04d}" for n in range(len(rows))]
    originals = {row.scene_id: key for row, key in zip(rows, keys, strict=True) if row.original is None}
    truth: list[dict[str, Any]] = []
    shards = []
    for number, start in enumerate(range(0, len(rows), shard_size)):
        members = list(zip(keys, rows, strict=True))[start : start + shard_size]
        shard = folder / f"{number:05d}.tar"
        with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, row in members:
                _add(tar, f"{key}.{row.extension}", row.data)
                _add(tar, f"{key}.txt", row.caption.encode())
                _add(tar, f"{key}.json", json.dumps(_metadata(key, row), ensure_ascii=False).encode())
        (folder / f"{number:05d}_stats.json").write_text(json.dumps(_stats(len(members)), indent=4))
        shards.append(shard)
        for index, (key, row) in enumerate(members):
            truth.append(
                {
                    "key": key,
                    "shard": shard.name,
                    "index": index,
                    "scene_id": row.scene_id,
                    "kind": row.kind,
                    "edit": row.edit,
                    "original_key": None if row.original is None else originals[row.original],
                    "caption": row.caption,
                    "true_caption": row.true_caption,
                    "scene": row.scene.to_json(),
                }
            )
    texts = ("key", "shard", "kind", "edit", "original_key", "caption", "true_caption", "scene")
    names = ("key", "shard", "index", "scene_id", "kind", "edit", "original_key", "caption", "true_caption", "scene")
    schema = pa.schema(
        [(name, pa.string() if name in texts else pa.int32()) for name in names],
        metadata={"schema_version": TRUTH_SCHEMA_VERSION, "seed": str(seed)},
    )
    pq.write_table(pa.Table.from_pylist(truth, schema=schema), folder / "truth.parquet")
    counts = Counter(row.kind for row in rows)
    edits = Counter(row.edit for row in rows if row.edit is not None)
    return WorldSummary(
        folder=folder,
        seed=seed,
        scenes=scenes,
        rows=len(rows),
        shards=tuple(shards),
        truth=folder / "truth.parquet",
        counts={kind: counts[kind] for kind in KINDS},
        edits={edit: edits[edit] for edit in EDITS},
    )


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _metadata(key: str, row: _Row) -> dict[str, Any]:
    """The `.json` of a sample with img2dataset's fields. A copy has an address of its own."""
    width, height = row.size
    return {
        "caption": row.caption,
        "url": f"https://world.example/{key}.{row.extension}",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "exif": "{}",
        "sha256": hashlib.sha256(row.data).hexdigest(),
    }


def _stats(count: int) -> dict[str, Any]:
    """img2dataset's statistics of a shard; times are zero, since the files must be the same for the same seed."""
    return {
        "count": count,
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": count},
    }
