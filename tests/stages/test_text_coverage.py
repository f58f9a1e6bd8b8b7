"""Text coverage: areas of polygons counted by hand, and the detector itself where it is installed."""

from __future__ import annotations

import importlib.util
import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from stages.contract import Batch, Context
from stages.decode import EncodedImage
from stages.text_coverage import TextCoverage, covered


def test_overlapping_boxes_are_counted_once_and_what_lies_outside_not_at_all() -> None:
    box = np.array([[0, 0], [49, 0], [49, 49], [0, 49]])
    assert covered((100, 100), []) == 0
    assert covered((100, 100), [box]) == pytest.approx(0.25)
    assert covered((100, 100), [box, box]) == pytest.approx(0.25)
    assert covered((100, 100), [box, box + 50]) == pytest.approx(0.5)
    assert covered((100, 100), [box * 100]) == 1
    assert covered((100, 100), [box - 500]) == 0


def test_a_missing_package_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install rapidocr onnxruntime"):
        TextCoverage().weights(Context())


def test_written_lines_are_found_and_a_plain_picture_has_none() -> None:
    for package in ("rapidocr", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install rapidocr onnxruntime")
    written = Image.new("RGB", (640, 480), "white")
    pen = ImageDraw.Draw(written)
    for line in range(3):
        pen.text((40, 40 + 140 * line), "HELLO WORLD", fill="black", font=ImageFont.load_default(60))
    images = []
    for picture in (written, Image.new("RGB", (640, 480), "grey")):
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        images.append(EncodedImage(stream.getvalue()))
    batch = Batch({"uid": ["a", "b", "c"]}, [*images, EncodedImage(b"broken")])
    answer = TextCoverage().open(Context())(batch)
    assert answer.values["boxes"] == [3, 0, None]
    assert 0.15 < answer.values["coverage"][0] < 0.5
    assert answer.values["coverage"][1] == 0
    assert answer.errors[2] == "not an image of a known format"
