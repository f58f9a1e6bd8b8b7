"""Exact hashes bit for bit against imagehash; the fast ones against areas averaged by hand, and for what they find."""

import io

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageFilter

from stages.contract import Batch, Context
from stages.decode import EncodedImage, open_reduced, upright_rgb
from stages.hashing import FastHash, PerceptualHash, grey_32, phash64


def pictures():
    rng = np.random.default_rng(0)
    for mode, shape in (("RGB", (50, 70, 3)), ("RGB", (300, 200, 3)), ("L", (33, 32)), ("RGBA", (64, 64, 4))):
        for blur in (0, 3):
            picture = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode)
            yield picture.filter(ImageFilter.GaussianBlur(blur)) if blur else picture
    yield Image.new("RGB", (40, 40), "white")
    yield Image.new("RGB", (40, 40), "red")
    yield Image.fromarray(rng.integers(0, 2, (64, 64), dtype=np.uint8) * 255).convert("1")
    yield Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)).convert("P")
    yield Image.fromarray(rng.integers(0, 256, (60, 60, 4), dtype=np.uint8), "CMYK")
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (90, 60, 3), dtype=np.uint8)).save(stream, "JPEG", quality=60)
    yield Image.open(stream)


def test_bits_are_those_of_imagehash():
    many = list(pictures())
    hashes = phash64([grey_32(picture) for picture in many])
    assert [f"{int(value):016x}" for value in hashes] == [str(imagehash.phash(picture)) for picture in many]


@pytest.mark.parametrize("size", [1, 2, 9])
def test_the_batch_does_not_change_a_hash(size):
    greys = [grey_32(picture) for picture in pictures()]
    parts = [phash64(greys[i : i + size]) for i in range(0, len(greys), size)]
    assert np.array_equal(np.concatenate(parts), phash64(greys))


def jpeg(picture: Image.Image, quality: int = 90) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def scenes(count: int) -> list[Image.Image]:
    """Coarse shapes with fine grain: no two alike."""
    rng = np.random.default_rng(2)
    made = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        grain = rng.integers(-12, 13, (480, 640, 1))
        made.append(Image.fromarray(np.clip(np.asarray(coarse, np.int16) + grain, 0, 255).astype(np.uint8)))
    return made


def fast(*files: bytes):
    answer = FastHash().open(Context())(Batch({"key": [""] * len(files)}, [EncodedImage(data) for data in files]))
    return answer.values["fast64"], answer.values["thumbnail"], answer.errors


def bits_apart(left: list[int], right: list[int]) -> list[int]:
    return [(a ^ b).bit_count() for a, b in zip(left, right, strict=True)]


def averaged(pixels_YXC: np.ndarray, side: int) -> np.ndarray:
    """(side, side, 3) means over equal areas, pixels on a border shared by how much of them lies on either side."""

    def shares(count: int) -> np.ndarray:
        edges = np.linspace(0, count, side + 1)
        covered = np.minimum(edges[1:, None], np.arange(1, count + 1)) - np.maximum(edges[:-1, None], np.arange(count))
        return np.maximum(covered, 0) * side / count

    height, width = pixels_YXC.shape[:2]
    return np.einsum("ay,bx,yxc->abc", shares(height), shares(width), pixels_YXC.astype(float), optimize=True)


def test_the_fast_hash_is_that_of_the_reduced_picture_averaged_by_areas():
    files = [jpeg(picture) for picture in scenes(12)]
    hashes, thumbnails, errors = fast(*files)
    assert errors == [None] * 12
    greys = []
    for data in files:
        means_YXC = averaged(open_reduced(data, 224), 32)
        greys.append(np.asarray(Image.fromarray(means_YXC.round().astype(np.uint8)).convert("L")))
    apart = bits_apart(hashes, [int(value) for value in phash64(greys)])
    assert max(apart) <= 2  # rounding alone
    for data, tiny in zip(files, thumbnails, strict=True):
        truth = upright_rgb(Image.open(io.BytesIO(data))).resize((8, 8), Image.Resampling.BOX)
        assert np.abs(np.frombuffer(tiny, np.uint8).astype(int) - np.frombuffer(truth.tobytes(), np.uint8)).max() <= 2


def test_the_fast_hash_finds_what_the_exact_one_finds_and_stays_near_it():
    pictures = scenes(24)
    files = [jpeg(picture) for picture in pictures]
    hashes = fast(*files)[0]
    for edited in (
        [jpeg(picture, 50) for picture in pictures],
        [jpeg(picture.resize((400, 300))) for picture in pictures],
    ):
        assert max(bits_apart(hashes, fast(*edited)[0])) <= 4
    unrelated = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(unrelated) > 8
    exact = PerceptualHash().open(Context())(Batch({"key": [""] * 24}, [EncodedImage(data) for data in files]))
    drift = bits_apart(hashes, exact.values["phash64"])
    assert np.mean(drift) <= 2
    assert max(drift) <= 8


def test_a_file_that_does_not_open_has_a_reason_and_neither_hash_nor_thumbnail():
    good = jpeg(scenes(1)[0])
    hashes, thumbnails, errors = fast(good, good[:2000], b"text")
    assert (hashes[1:], thumbnails[1:]) == ([None, None], [None, None])
    assert errors[0] is None
    assert errors[1].startswith("does not decode")
    assert errors[2] == "not an image of a known format"
