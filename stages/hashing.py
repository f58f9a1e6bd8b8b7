"""Perceptual hashes: 64 bits, exactly imagehash's or quickly had, and a small colour thumbnail for a second look.

    stages:
      hash: {type: perceptual_hash}       # hash.phash64, hash.thumbnail
      quick: {type: fast_hash}            # quick.fast64, quick.thumbnail

`phash64` is the DCT hash of imagehash.phash (hash_size 8, highfreq_factor 4): grey, 32x32 by Lanczos, DCT-II over
both axes, the 8x8 lowest frequencies compared with their median; bit 63 is the first coefficient, so that
hex(phash64) is str(hash). The DCTs of a batch are taken at once. pHash sees only coarse brightness: plain pictures of
different colours share one hash, which is why duplicates are decided with a second look at `thumbnail`.

`fast64` is the same transform of another 32x32: the means of areas of a reduced-size decode of the upright picture. It
costs a fraction and finds the same duplicates, but its bits are its own (1 of 64 differs from `phash64` on average, now
and then 10), so the two are never compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from stages.contract import Batch, Column, Columns, Context, Measure, Stage
from stages.decode import REDUCED_SIDE, opencv, upright_rgb

HASH_SIDE = 8
DCT_SIDE = 32
THUMBNAIL_SIDE = 8


def grey_32(picture: Image.Image) -> np.ndarray:
    """(32, 32) uint8: what imagehash.phash feeds its DCT."""
    return np.asarray(picture.convert("L").resize((DCT_SIDE, DCT_SIDE), Image.Resampling.LANCZOS))


def phash64(greys: Sequence[np.ndarray]) -> np.ndarray:
    """(N,) uint64 hashes of N (32, 32) grey pictures; the bits of imagehash.phash."""
    from scipy.fft import dct

    grey_NYX = np.stack(greys).astype(np.float64)
    low_NYX = dct(dct(grey_NYX, axis=1), axis=2)[:, :HASH_SIDE, :HASH_SIDE]
    median_N = np.median(low_NYX.reshape(len(low_NYX), -1), axis=1)
    bits_NB = (low_NYX > median_N[:, None, None]).reshape(len(low_NYX), -1)
    return np.packbits(bits_NB, axis=1).view(">u8").ravel().astype(np.uint64)


def thumbnail(picture: Image.Image) -> bytes:
    """8x8 RGB bytes (192) of the upright picture, each pixel the mean of its area."""
    return upright_rgb(picture).resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX).tobytes()


@dataclass(frozen=True, kw_only=True)
class PerceptualHash(Stage):
    """64-bit pHash and colour thumbnail of every picture that opens."""

    type: ClassVar[str] = "perceptual_hash"
    adds: ClassVar[tuple[Column, ...]] = (
        Column("phash64", "uint64", scale="imagehash.phash"),
        Column("thumbnail", f"fixed_binary[{THUMBNAIL_SIDE * THUMBNAIL_SIDE * 3}]", "8x8 RGB", feature=True),
    )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image",)

    def open(self, context: Context) -> Measure:
        def measure(batch: Batch) -> Columns:
            hashes: list[Any] = [None] * len(batch)
            thumbnails: list[Any] = [None] * len(batch)
            errors: list[str | None] = [None] * len(batch)
            greys: list[np.ndarray] = []
            seen: list[int] = []
            for row in range(len(batch)):
                picture = batch.image(row)
                if picture is None:
                    errors[row] = batch.image_error(row)
                    continue
                greys.append(grey_32(picture))
                thumbnails[row] = thumbnail(picture)
                seen.append(row)
            if greys:
                for row, value in zip(seen, phash64(greys), strict=True):
                    hashes[row] = int(value)
            return Columns({"phash64": hashes, "thumbnail": thumbnails}, errors)

        return measure


def reduced_32(pixels_YXC: np.ndarray) -> tuple[np.ndarray, bytes]:
    """((32, 32) uint8 grey, 8x8 RGB bytes) of an upright RGB picture: means of areas."""
    cv2 = opencv()
    small_YXC = cv2.resize(pixels_YXC, (DCT_SIDE, DCT_SIDE), interpolation=cv2.INTER_AREA)
    tiny_YXC = cv2.resize(small_YXC, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small_YXC, cv2.COLOR_RGB2GRAY), tiny_YXC.tobytes()


@dataclass(frozen=True, kw_only=True)
class FastHash(Stage):
    """64-bit DCT hash and colour thumbnail of every picture, from its reduced-size decode. Not imagehash's bits."""

    type: ClassVar[str] = "fast_hash"
    adds: ClassVar[tuple[Column, ...]] = (
        Column("fast64", "uint64", scale="DCT of the reduced picture"),
        Column("thumbnail", f"fixed_binary[{THUMBNAIL_SIDE * THUMBNAIL_SIDE * 3}]", "8x8 RGB", feature=True),
    )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image",)

    def open(self, context: Context) -> Measure:
        def measure(batch: Batch) -> Columns:
            hashes: list[Any] = [None] * len(batch)
            thumbnails: list[Any] = [None] * len(batch)
            errors: list[str | None] = [None] * len(batch)
            greys: list[np.ndarray] = []
            seen: list[int] = []
            for row in range(len(batch)):
                pixels_YXC = batch.reduced(row, REDUCED_SIDE)
                if pixels_YXC is None:
                    errors[row] = batch.image_error(row)
                    continue
                grey_YX, thumbnails[row] = reduced_32(pixels_YXC)
                greys.append(grey_YX)
                seen.append(row)
            if greys:
                for row, value in zip(seen, phash64(greys), strict=True):
                    hashes[row] = int(value)
            return Columns({"fast64": hashes, "thumbnail": thumbnails}, errors)

        return measure
