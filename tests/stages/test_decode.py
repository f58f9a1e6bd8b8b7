"""Decoding: formats, orientations and damage, one smallest image each."""

import io
import random

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

import stages.decode
from stages.contract import Batch, Context
from stages.decode import Decode, EncodedImage, open_picture, open_reduced, sniff, upright_rgb
from stages.hashing import FastHash


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def noise(width=40, height=30, mode="RGB") -> Image.Image:
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "CMYK": 4}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode)


def measure(*files: bytes | None, reduced: bool = False):
    images = [EncodedImage(data) for data in files]
    return Decode(reduced=reduced).open(Context())(Batch({"key": [str(i) for i in range(len(files))]}, images))


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


# --- reduced-size decoding -------------------------------------------------------------------------------------------


def smooth(width: int, height: int) -> Image.Image:
    """Coarse colours made large: reducing it in any sound way gives nearly the same pixels."""
    small = np.random.default_rng(1).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(1600, 1200), (500, 900), (450, 448), (300, 225), (224, 224), (4000, 30), (40, 30)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_reduced_picture_has_the_side_asked_for_and_the_colours_of_the_whole(size, kind):
    data = encoded(smooth(*size), kind)
    pixels = open_reduced(data, 224)
    short = min(pixels.shape[:2])
    assert min(224, *size) <= short < 448
    assert pixels.shape[1] / pixels.shape[0] == pytest.approx(size[0] / size[1], rel=0.02)
    whole = open_picture(data).convert("RGB").resize(pixels.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(pixels.astype(int) - np.asarray(whole)).mean() < 2


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_reduced_picture_is_turned_upright(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(smooth(700, 500), "JPEG", exif=exif)
    pixels = open_reduced(data, 224)
    upright = ImageOps.exif_transpose(open_picture(data)).resize(pixels.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(pixels.astype(int) - np.asarray(upright)).mean() < 2


def with_bytes(data: bytes, place: int, replacement: bytes) -> bytes:
    return data[:place] + replacement + data[place + len(replacement) :]


def odd_files() -> dict[str, bytes]:
    """What trips decoders: modes, orientations, animation, alpha, 16 bits, bombs, and damage of every kind."""
    turned, broken = Image.Exif(), Image.Exif()
    turned[0x0112], broken[0x0112] = 6, 99
    jpeg = encoded(noise(300, 280), "JPEG")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return {
        "grey": encoded(noise(mode="L"), "JPEG"),
        "cmyk": encoded(noise(mode="CMYK"), "JPEG"),
        "progressive": encoded(noise(300, 280), "JPEG", progressive=True),
        "turned": encoded(noise(300, 280), "JPEG", exif=turned),
        "turned to nowhere": encoded(noise(300, 280), "JPEG", exif=broken),
        "garbled exif": encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40),
        "alpha": encoded(noise(mode="RGBA"), "PNG"),
        "sixteen bits": encoded(Image.fromarray(np.full((9, 9), 32896, np.uint16)), "PNG"),
        "animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "bomb": encoded(Image.new("1", (20_000, 20_000)), "PNG"),
        "wide header": with_bytes(jpeg, jpeg.index(b"\xff\xc0") + 5, b"\xff\xff\xff\xff"),
        "broken off": jpeg[:-500],
        "broken off early": jpeg[:700],
        "header alone": jpeg[:30],
        "bad codes": with_bytes(jpeg, len(jpeg) // 2, b"\xff\x00\xff\x17" * 8),
        "bytes after the end": jpeg + b"more",
        "two in one": jpeg + jpeg,
        "text": b"hello",
        "empty": b"",
    }


@pytest.mark.parametrize("name", odd_files())
def test_both_ways_of_decoding_say_the_same_of_odd_files(name):
    data = odd_files()[name]
    exact, reduced = measure(data), measure(data, reduced=True)
    assert reduced.errors == exact.errors
    assert reduced.values == exact.values


def test_both_ways_of_decoding_open_the_same_damaged_files():
    chance = random.Random(0)
    data = [encoded(noise(60, 50), "JPEG"), encoded(smooth(400, 300).filter(ImageFilter.EMBOSS), "JPEG")]
    damaged = []
    for _ in range(400):
        one = bytearray(chance.choice(data))
        place = chance.randrange(len(one))
        if chance.random() < 0.3:
            del one[place:]
        elif chance.random() < 0.5:
            del one[place : place + chance.randrange(1, 400)]
        else:
            for _ in range(chance.randrange(1, 5)):
                one[chance.randrange(len(one))] = chance.randrange(256)
        damaged.append(bytes(one))
    exact, reduced = measure(*damaged), measure(*damaged, reduced=True)
    assert 50 < sum(error is None for error in exact.errors) < 350
    assert reduced.errors == exact.errors
    assert reduced.values == exact.values


def test_one_reduced_decode_serves_every_measure_of_a_pass(monkeypatch):
    calls = []
    plain = stages.decode.open_reduced
    monkeypatch.setattr(stages.decode, "open_reduced", lambda *given: calls.append(1) or plain(*given))
    monkeypatch.setattr(stages.decode, "open_picture", lambda *given: pytest.fail("decoded in full"))
    batch = Batch({"key": ["a", "b"]}, [EncodedImage(encoded(noise(), "JPEG")) for _ in range(2)])
    for stage in (Decode(reduced=True), FastHash()):
        assert stage.open(Context())(batch).errors == [None, None]
    assert len(calls) == 2


def test_an_upright_rgb_picture_is_not_copied():
    picture = open_picture(encoded(noise(), "JPEG"))
    assert upright_rgb(picture) is picture
