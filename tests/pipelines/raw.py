"""Small raw inputs for curation tests: photographs made of noise, written as tars, Parquet or folders."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CAPTION = "a photo of number {}"


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth random picture: no two seeds are near-duplicates."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 92) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def sample(key: str, data: bytes, caption: str | None, **metadata) -> list[tuple[str, bytes]]:
    members = [(f"{key}.jpg", data)]
    if caption is not None:
        members.append((f"{key}.txt", caption.encode()))
    if metadata:
        members.append((f"{key}.json", json.dumps(metadata).encode()))
    return members


def write_world(folder: Path, shards: int = 3, rows: int = 10) -> str:
    """Shards of distinct pictures with one byte duplicate, one near-duplicate, one small, one corrupt and one without
    a caption in each. Returns the pattern that names them."""
    for shard in range(shards):
        members: list[tuple[str, bytes]] = []
        for row in range(rows):
            number = shard * 1000 + row
            members += sample(f"{number:09d}", jpeg(picture(number)), CAPTION.format(number), id=f"source-{number}")
        first = shard * 1000
        members += sample(f"{first + 900:09d}", jpeg(picture(first)), CAPTION.format(first))
        members += sample(f"{first + 901:09d}", jpeg(picture(first + 1), 60), "the same, saved again")
        members += sample(f"{first + 902:09d}", jpeg(picture(first + 902, (16, 12))), "a small photo of it")
        members += sample(f"{first + 903:09d}", jpeg(picture(first + 903))[:-200], "a photo cut short")
        members += sample(f"{first + 904:09d}", jpeg(picture(first + 904)), None)
        write_tar(folder / f"{shard:05d}.tar", members)
    return str(folder / ("{00000..%05d}.tar" % (shards - 1)))  # noqa: UP031


RECIPE = {
    "stages": {"decode": {}, "text": {"type": "text_quality"}, "hash": {"type": "perceptual_hash"}},
    "rules": {
        "short_side": {"column": "decode.short_side", "at_least": 32},
        "caption": {"column": "text.flaw", "is_null": True},
        "exact": {"type": "exact_duplicates"},
        "near": {"type": "near_duplicates"},
    },
    "held_out": {"fraction": 0.2},
}
