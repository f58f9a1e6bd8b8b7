"""Decoding: encoded bytes to a picture, once a pass, with limits; and the measure of what came out.

    stages:
      decode: {}               # decode.width, .height, .pixels, .short_side, .aspect, .mode, .format
      decode: {reduced: true}  # the same columns, from the header and a reduced-size decode

Input is hostile: only the formats below are tried, a picture's size is checked from its header before a pixel is
decoded, and a file that does not open leaves a reason in its row.

A picture is had in two ways, each made at most once a pass and shared by the stages that ask for it: `picture()`,
every pixel as Pillow decodes it, and `reduced(side)`, upright RGB whose short side is at least `side` and less than
twice that (a smaller picture stays as it is). JPEGs are scaled inside the decoder, by libjpeg-turbo's n/8 scaling of
the DCT, which leaves little but the entropy decoding to pay for. What that decoder refuses or warns of goes to Pillow,
so that both ways open the same files and give the same reasons.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageOps

from stages.contract import Batch, Column, Columns, Context, LazyImage, Measure, Stage

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF")
MAX_PIXELS = 100_000_000
KEPT_PIXELS = 100_000_000
# Least short side (px) of a reduced picture unless a model wants more: what most CLIPs see.
REDUCED_SIDE = 224
ORIENTATION = 0x0112  # the EXIF tag

# Pillow warns of bombs at a size of its own (ours is checked from the header) and of odd EXIF, which is read as none.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Extension of a file by its first bytes: names lie, bytes are what a decoder reads.
_MAGIC: tuple[tuple[bytes, int, str], ...] = (
    (b"\xff\xd8\xff", 0, "jpg"),
    (b"\x89PNG\r\n\x1a\n", 0, "png"),
    (b"WEBP", 8, "webp"),
    (b"GIF8", 0, "gif"),
    (b"II*\0", 0, "tiff"),
    (b"MM\0*", 0, "tiff"),
    (b"BM", 0, "bmp"),
    (b"ftypavif", 4, "avif"),
)


def sniff(data: bytes) -> str | None:
    """The usual extension of the image format that `data` begins like, or None."""
    for magic, offset, extension in _MAGIC:
        if data[offset : offset + len(magic)] == magic:
            return extension
    return "ppm" if re.match(rb"P[1-6]\s", data[:3]) else None


class PixelBudget:
    """How many pixels the pictures of one batch may keep decoded at once; the others are decoded when asked for."""

    def __init__(self, pixels: int = KEPT_PIXELS) -> None:
        self.left = pixels

    def take(self, pixels: int) -> bool:
        """Whether there is room for so many pixels, which is then taken."""
        fits = pixels <= self.left
        self.left -= pixels if fits else 0
        return fits


class EncodedImage(LazyImage):
    """Encoded bytes of one image. It decodes at most once in either way, unless the picture is so large that `budget`
    has no room for it; `error` says why there is no picture."""

    def __init__(
        self,
        data: bytes | None,
        error: str | None = None,
        max_pixels: int = MAX_PIXELS,
        budget: PixelBudget | None = None,
    ) -> None:
        self.data = data
        self.error = error or (None if data else "no image bytes")
        self.max_pixels = max_pixels
        self.budget = budget or PixelBudget()
        self._picture: Image.Image | None = None
        self._header: Image.Image | None = None
        self._reduced: tuple[int, np.ndarray] | None = None

    def picture(self) -> Image.Image | None:
        if self._picture is not None or self.error is not None:
            return self._picture
        try:
            picture = open_picture(self.data or b"", self.max_pixels)
        except ValueError as problem:
            self.error = str(problem)
            return None
        if self.budget.take(picture.width * picture.height):
            self._picture = picture
        return picture

    def reduced(self, side: int) -> np.ndarray | None:
        held = self._reduced
        if held is not None and held[0] == side:
            return held[1]
        header = self.header()
        if header is None:
            return None
        try:
            pixels_YXC = open_reduced(self.data or b"", side, self.max_pixels, header)
        except ValueError as problem:
            self.error = str(problem)
            return None
        self._forget_reduced()
        if self.budget.take(pixels_YXC.shape[0] * pixels_YXC.shape[1]):
            self._reduced = (side, pixels_YXC)
        return pixels_YXC

    def header(self) -> Image.Image | None:
        if self._header is None and self.error is None:
            try:
                self._header = open_header(self.data or b"", self.max_pixels)
            except ValueError as problem:
                self.error = str(problem)
        return self._header

    def release(self) -> None:
        """Forget the pixels (the bytes stay)."""
        if self._picture is not None:
            self.budget.left += self._picture.width * self._picture.height
        self._forget_reduced()
        self._picture = self._header = None

    def _forget_reduced(self) -> None:
        if self._reduced is not None:
            self.budget.left += self._reduced[1].shape[0] * self._reduced[1].shape[1]
            self._reduced = None


def open_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame of `data`, known by its header alone. Raises ValueError with a reason that repeats."""
    with _stable_reasons(data, max_pixels):
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if picture.width * picture.height > max_pixels:
            raise ValueError(f"too many pixels: {picture.width}x{picture.height}, the limit is {max_pixels}")
    return picture


def open_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the first frame of `data`. Raises ValueError with a reason that is the same on every run."""
    picture = open_header(data, max_pixels)
    with _stable_reasons(data, max_pixels):
        picture.load()
    return picture


def open_reduced(
    data: bytes, side: int = REDUCED_SIDE, max_pixels: int = MAX_PIXELS, header: Image.Image | None = None
) -> np.ndarray:
    """(height, width, 3) uint8 RGB of the upright picture, its short side in [side, 2 side) or as it was if smaller.

    header: what `open_header` gave, where it is at hand. Raises ValueError for the files, and with the reasons, that
    `open_picture` does.
    """
    header = header or open_header(data, max_pixels)
    if header.format == "JPEG":
        import simplejpeg

        try:
            # strict: warnings (a file that breaks off, bad codes) are errors here, and Pillow's to judge.
            pixels_YXC = simplejpeg.decode_jpeg(data, "RGB", min_height=side, min_width=side, min_factor=1, strict=True)
        except ValueError:
            pass
        else:
            return _shrink(_turned(pixels_YXC, orientation(header)), side)
    return _shrink(np.asarray(upright_rgb(open_picture(data, max_pixels))), side)


@functools.cache
def opencv() -> Any:
    """OpenCV's module, imported when first used and kept to one thread: workers fill the machine already."""
    import cv2

    cv2.setNumThreads(0)
    return cv2


def orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none that can be read."""
    try:
        value = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow's parser raises whatever it stumbles over
        return 1
    return value if value in range(1, 9) else 1


def _shrink(pixels_YXC: np.ndarray, side: int) -> np.ndarray:
    """Blocks of k by k pixels averaged, for the largest k that leaves a short side of at least `side`."""
    height, width = pixels_YXC.shape[:2]
    factor = min(height, width) // side
    if factor < 2:
        return pixels_YXC
    cv2 = opencv()
    height, width = height // factor, width // factor
    whole_YXC = pixels_YXC[: height * factor, : width * factor]
    return cv2.resize(whole_YXC, (width, height), interpolation=cv2.INTER_AREA)


def _turned(pixels_YXC: np.ndarray, turn: int) -> np.ndarray:
    """Pixels as people see them, by EXIF orientation (1 to 8)."""
    if turn in (5, 6, 7, 8):
        pixels_YXC = pixels_YXC.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):
        pixels_YXC = pixels_YXC[::-1]
    if turn in (2, 3, 6, 7):
        pixels_YXC = pixels_YXC[:, ::-1]
    return np.ascontiguousarray(pixels_YXC)


@contextlib.contextmanager
def _stable_reasons(data: bytes, max_pixels: int) -> Iterator[None]:
    """Whatever a decoder raises inside the block, as a ValueError with a reason that is the same on every run."""
    try:
        yield
    except Image.UnidentifiedImageError:
        kind = sniff(data)
        raise ValueError(f"damaged {kind} header" if kind else "not an image of a known format") from None
    except Image.DecompressionBombError:
        raise ValueError(f"too many pixels: the limit is {max_pixels}") from None
    except ValueError as problem:
        raise ValueError(_stable(str(problem))) from None
    except Exception as problem:
        # Decoders raise whatever they like on damaged input (OSError, SyntaxError, struct.error, EOFError, ...).
        raise ValueError(_stable(f"does not decode: {problem or type(problem).__name__}")) from None


def _stable(reason: str) -> str:
    """A reason without object addresses or counts of leftover bytes, so that equal failures are counted together."""
    reason = re.sub(r"<[^>]*0x[0-9a-f]+>", "the file", reason)
    return re.sub(r" ?\(\d+ bytes not processed\)", "", reason)[:200]


def upright_rgb(picture: Image.Image) -> Image.Image:
    """The picture as people see it: turned by its EXIF orientation, alpha laid on white, RGB.

    A picture that is all that already is given back itself: not every stage can afford a copy of its pixels.
    """
    if orientation(picture) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(ground, picture)
    if picture.mode.startswith("I"):
        # 16-bit greys: a plain `convert` would clip them at 255 instead of scaling.
        picture = picture.convert("F").point(lambda value: value * (1 / 257) + 0).convert("L")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


@dataclass(frozen=True, kw_only=True)
class Decode(Stage):
    """Size, mode and format of every picture; a picture that does not open becomes an error with its reason.

    reduced: look at `reduced(REDUCED_SIDE)` to see whether a file opens, as the other fast measures do, instead of
    decoding every pixel. The columns are the same.
    """

    type: ClassVar[str] = "decode"
    adds: ClassVar[tuple[Column, ...]] = (
        Column("width", "int32", "px"),
        Column("height", "int32", "px"),
        Column("pixels", "int64", "px"),
        Column("short_side", "int32", "px"),
        Column("aspect", "float32", "long side / short side", ">= 1"),
        Column("mode", "string"),
        Column("format", "string"),
    )
    max_pixels: int = MAX_PIXELS
    reduced: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image",)

    def open(self, context: Context) -> Measure:
        def measure(batch: Batch) -> Columns:
            values: dict[str, list[Any]] = {column.name: [None] * len(batch) for column in self.adds}
            errors: list[str | None] = [None] * len(batch)
            for row in range(len(batch)):
                opens = not self.reduced or batch.reduced(row, REDUCED_SIDE) is not None
                picture = (batch.header(row) if self.reduced else batch.image(row)) if opens else None
                if picture is None:
                    errors[row] = batch.image_error(row)
                    continue
                # Orientations 5..8 are quarter turns: what a person sees has width and height exchanged.
                turned = orientation(picture) >= 5
                width, height = picture.size[::-1] if turned else picture.size
                if width * height > self.max_pixels:
                    errors[row] = f"too many pixels: {width}x{height}, the limit is {self.max_pixels}"
                    continue
                found = (width, height, width * height, min(width, height), max(width, height) / min(width, height))
                for column, value in zip(self.adds, (*found, picture.mode, picture.format), strict=True):
                    values[column.name][row] = value
            return Columns(values, errors)

        return measure
