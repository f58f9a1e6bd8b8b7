"""Decoding: encoded bytes to a picture, once a pass, with limits; and the measure of what came out.

    stages:
      decode: {}          # decode.width, decode.height, decode.short_side, decode.aspect, decode.mode, decode.format

Input is hostile: only the formats below are tried, a picture's size is checked from its header before a pixel is
decoded, and a file that does not open leaves a reason in its row.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image, ImageOps

from stages.contract import Batch, Column, Columns, Context, LazyImage, Measure, Stage

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF")
MAX_PIXELS = 100_000_000

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


class EncodedImage(LazyImage):
    """Encoded bytes of one image. `picture()` decodes at most once; `error` says why there is none."""

    def __init__(self, data: bytes | None, error: str | None = None, max_pixels: int = MAX_PIXELS) -> None:
        self.data = data
        self.error = error or (None if data else "no image bytes")
        self.max_pixels = max_pixels
        self._picture: Image.Image | None = None

    def picture(self) -> Image.Image | None:
        if self._picture is None and self.error is None:
            try:
                self._picture = open_picture(self.data or b"", self.max_pixels)
            except ValueError as problem:
                self.error = str(problem)
        return self._picture

    def release(self) -> None:
        """Forget the pixels (the bytes stay)."""
        self._picture = None


def open_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the first frame of `data`. Raises ValueError with a reason that is the same on every run."""
    try:
        with warnings.catch_warnings():
            # Pillow's own bomb warning comes at a fixed size; ours is checked below, before any pixel is decoded.
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            if picture.width * picture.height > max_pixels:
                raise ValueError(f"too many pixels: {picture.width}x{picture.height}, the limit is {max_pixels}")
            picture.load()
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
    return picture


def _stable(reason: str) -> str:
    """A reason without object addresses or counts of leftover bytes, so that equal failures are counted together."""
    reason = re.sub(r"<[^>]*0x[0-9a-f]+>", "the file", reason)
    return re.sub(r" ?\(\d+ bytes not processed\)", "", reason)[:200]


def upright_rgb(picture: Image.Image) -> Image.Image:
    """The picture as people see it: turned by its EXIF orientation, alpha laid on white, RGB."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(ground, picture)
    if picture.mode.startswith("I"):
        # 16-bit greys: a plain `convert` would clip them at 255 instead of scaling.
        picture = picture.convert("F").point(lambda value: value * (1 / 257) + 0).convert("L")
    return picture.convert("RGB")


@dataclass(frozen=True, kw_only=True)
class Decode(Stage):
    """Size, mode and format of every picture; a picture that does not open becomes an error with its reason."""

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

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image",)

    def open(self, context: Context) -> Measure:
        def measure(batch: Batch) -> Columns:
            values: dict[str, list[Any]] = {column.name: [None] * len(batch) for column in self.adds}
            errors: list[str | None] = [None] * len(batch)
            for row in range(len(batch)):
                picture = batch.image(row)
                if picture is None:
                    errors[row] = batch.image_error(row)
                    continue
                # Orientations 5..8 are quarter turns: what a person sees has width and height exchanged.
                turned = picture.getexif().get(0x0112, 1) >= 5
                width, height = picture.size[::-1] if turned else picture.size
                if width * height > self.max_pixels:
                    errors[row] = f"too many pixels: {width}x{height}, the limit is {self.max_pixels}"
                    continue
                found = (width, height, width * height, min(width, height), max(width, height) / min(width, height))
                for column, value in zip(self.adds, (*found, picture.mode, picture.format), strict=True):
                    values[column.name][row] = value
            return Columns(values, errors)

        return measure
