"""nudenet's stage: what it says where the package is missing, and what it measures where it is there."""

from __future__ import annotations

import importlib.util
import io

import numpy as np
import pytest
from PIL import Image

from stages.contract import Batch, Context
from stages.decode import EncodedImage
from stages.safety import EXPOSED, NudeNet


def encoded(picture: Image.Image) -> EncodedImage:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return EncodedImage(stream.getvalue())


def test_a_missing_package_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install nudenet"):
        NudeNet().weights(Context())


def test_a_picture_without_people_scores_nothing_and_a_broken_one_has_its_reason() -> None:
    pytest.importorskip("nudenet", reason="nudenet is not installed: pip install nudenet")
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    batch = Batch({"uid": ["a", "b", "c"]}, [encoded(Image.fromarray(noise)), EncodedImage(b"no"), EncodedImage(None)])
    answer = NudeNet().open(Context())(batch)
    assert answer.values["score"] == [0.0, None, None]
    assert answer.errors == [None, "not an image of a known format", "no image bytes"]


def test_the_surest_bare_detection_counts_and_faces_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's answers, made up; that the real one is called so is the test above."""
    import sys
    import types

    class Detector:
        def detect(self, pixels_HWC: np.ndarray) -> list[dict]:
            assert pixels_HWC.shape == (4, 6, 3)
            assert pixels_HWC[0, 0].tolist() == [0, 0, 255]  # red, in OpenCV's order
            scored = (("FACE_FEMALE", 0.9), (EXPOSED[0], 0.4), (EXPOSED[1], 0.6), (EXPOSED[1], 0.2))
            return [{"class": name, "score": score, "box": [0, 0, 1, 1]} for name, score in scored]

    monkeypatch.setitem(sys.modules, "nudenet", types.SimpleNamespace(NudeDetector=Detector))
    monkeypatch.setattr(NudeNet, "weights", lambda self, context: {})
    answer = NudeNet().open(Context())(Batch({"uid": ["a"]}, [encoded(Image.new("RGB", (6, 4), "red"))]))
    assert answer.values["score"] == [0.6]
    assert answer.values["labels"] == ["ANUS_EXPOSED, BUTTOCKS_EXPOSED, FACE_FEMALE"]
