"""A seeded corpus of real-looking JPEGs: crops of the photographs that scikit-image and scikit-learn ship.

Long sides from 256 to 1600 px (uniform in their logarithm), qualities from 70 to 94, crops of half to all of a picture,
mirrored or not, brighter or darker, with a little sensor noise where a picture is enlarged, so that entropy decoding
has as much to do as with a photograph of that size; captions of 3 to 30 words.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

LEAST_PX, MOST_PX = 256, 1600
# Among scikit-image's files these are photographs of some size; the others are drawings, masks and microscopy.
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
WORDS = ("a", "the", "of", "on", "in", "with", "red", "old", "two", "people", "boat", "street", "dog", "tree", "window")


def photographs() -> list[Image.Image]:
    """The photographs that lie in both packages, as RGB."""
    import skimage
    import sklearn

    folder = Path(skimage.__file__).parent / "data"
    paths = [folder / name for name in PHOTOGRAPHS]
    paths += sorted((Path(sklearn.__file__).parent / "datasets" / "images").glob("*.jpg"))
    return [Image.open(path).convert("RGB") for path in paths if path.exists()]


def make_jpegs(count: int, seed: int = 0, most_px: int = MOST_PX) -> list[bytes]:
    """`count` different JPEGs."""
    rng = np.random.default_rng(seed)
    sources = photographs()
    if len(sources) < 8:
        raise SystemExit(
            "the corpus needs the photographs of scikit-image and scikit-learn: pip install 'sluice[bench]'"
        )
    return [_jpeg(rng, sources[rng.integers(len(sources))], most_px) for _ in range(count)]


def _jpeg(rng: np.random.Generator, source: Image.Image, most_px: int) -> bytes:
    long_px = np.exp(rng.uniform(np.log(LEAST_PX), np.log(most_px)))
    share = rng.uniform(0.5, 1, 2)
    width, height = (int(side * part) for side, part in zip(source.size, share, strict=True))
    left, top = rng.integers(0, source.width - width + 1), rng.integers(0, source.height - height + 1)
    scale = long_px / max(width, height)
    size = (max(32, round(width * scale)), max(32, round(height * scale)))
    box = (left, top, left + width, top + height)
    picture = source.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.8, 1.2))
    if scale > 1:
        noise = rng.integers(-3, 4, (size[1], size[0], 1), dtype=np.int16)
        picture = Image.fromarray(np.clip(np.asarray(picture, np.int16) + noise, 0, 255).astype(np.uint8))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=int(rng.integers(70, 95)))
    return stream.getvalue()


def make_captions(count: int, seed: int = 0) -> list[str]:
    """`count` captions of 3 to 30 words."""
    rng = np.random.default_rng([seed, 1])
    return [" ".join(rng.choice(WORDS, rng.integers(3, 31))) for _ in range(count)]


def write_tars(folder: Path, jpegs: Sequence[bytes], captions: Sequence[str], rows: int, samples: int) -> list[Path]:
    """WebDataset tars of `rows` samples, `samples` in all; pictures come round again where there are not enough."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard, first in enumerate(range(0, samples, rows)):
        paths.append(folder / f"{shard:05d}.tar")
        with tarfile.open(paths[-1], "w") as archive:
            for row in range(first, min(first + rows, samples)):
                members = (
                    (f"{row:09d}.jpg", jpegs[row % len(jpegs)]),
                    (f"{row:09d}.txt", captions[row % len(captions)]),
                )
                for name, content in members:
                    data = content if isinstance(content, bytes) else content.encode()
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    return paths
