"""Decoding: formats, orientations and damage, one smallest image each."""

import io

import numpy as np
import pytest
from PIL import Image

from stages.contract import Batch, Context
from stages.decode import Decode, EncodedImage, open_picture, sniff, upright_rgb


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def noise(width=40, height=30, mode="RGB") -> Image.Image:
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "CMYK": 4}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode)


def measure(*files: bytes | None):
    images = [EncodedImage(data) for data in files]
    return Decode().open(Context())(Batch({"key": [str(i) for i in range(len(files))]}, images))


@pytest.mark.parametrize(
    ("kind", "extension"),
    [
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("GIF", "gif"),
        ("TIFF", "tiff"),
        ("BMP", "bmp"),
        ("PPM", "ppm"),
    ],
)
def test_each_format_opens_and_is_known_by_its_first_bytes(kind, extension):
    data = encoded(noise(), kind)
    assert sniff(data) == extension
    answer = measure(data)
    assert answer.errors == [None]
    assert (answer.values["width"], answer.values["height"]) == ([40], [30])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no image bytes"),
        (b"hello, this is text", "not an image of a known format"),
        (b"\xff\xd8\xff" + b"\0" * 100, "damaged jpg header"),
        (encoded(noise(), "JPEG")[:-300], "does not decode: image file is truncated"),
        (encoded(noise(), "PNG")[:-300], "does not decode: image file is truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image of a known format"),
    ],
)
def test_damage_leaves_a_reason_and_takes_no_neighbour_along(data, reason):
    good = encoded(noise(), "PNG")
    answer = measure(good, data, good)
    assert answer.errors[0] is None
    assert answer.errors[2] is None
    assert answer.errors[1].startswith(reason)
    assert answer.values["width"] == [40, None, 40]


def test_the_same_damage_gives_the_same_words_twice():
    data = encoded(noise(), "JPEG")[:-300]
    assert measure(data).errors == measure(data).errors


def test_a_decompression_bomb_is_refused_from_its_header():
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(ValueError, match="too many pixels"):
        open_picture(bomb)


def test_width_and_height_are_those_of_the_upright_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    answer = measure(encoded(noise(40, 30), "JPEG", exif=exif))
    assert (answer.values["width"], answer.values["height"]) == ([30], [40])
    assert upright_rgb(open_picture(encoded(noise(40, 30), "JPEG", exif=exif))).size == (30, 40)


def test_alpha_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert upright_rgb(clear).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_greys_keep_their_shades():
    grey = Image.fromarray(np.full((4, 4), 32896, np.uint16))
    assert abs(upright_rgb(grey).getpixel((0, 0))[0] - 128) <= 1


def test_only_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert upright_rgb(open_picture(data)).getpixel((0, 0)) == (255, 0, 0)
