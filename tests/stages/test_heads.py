"""Classifier heads against torch's own layers, whatever stands between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stages.contract import Batch, Context
from stages.safety import Safety
from stages.watermark import Watermark


def vectors(count: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, width)).astype(np.float16)


def scores(stage: Safety | Watermark, folder: Path, e_ND: np.ndarray) -> np.ndarray:
    answer = stage.open(Context(models=(str(folder),)))(Batch({stage.embedding: list(e_ND)}))
    assert not any(answer.errors or [])
    return np.array(answer.values["score"])


@pytest.mark.parametrize(
    ("activation", "between"), [("relu", torch.nn.ReLU()), ("gelu", torch.nn.GELU()), ("none", torch.nn.Identity())]
)
@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_a_head_gives_the_probability_that_its_layers_give(
    tmp_path: Path, activation: str, between: torch.nn.Module, outputs: int
) -> None:
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(24, 16), between, torch.nn.Linear(16, outputs))
    save_file(layers.state_dict(), tmp_path / "head.safetensors")
    e_ND = vectors(12, 24)
    with torch.no_grad():
        unit = torch.nn.functional.normalize(torch.from_numpy(e_ND.astype(np.float32)), dim=-1)
        logits = layers(unit)
        expected = logits.sigmoid()[:, 0] if outputs == 1 else logits.softmax(-1)[:, outputs - 1]
    found = scores(Safety(head="head.safetensors", activation=activation), tmp_path, e_ND)
    assert np.allclose(found, expected.numpy(), atol=1e-5)
    assert ((found >= 0) & (found <= 1)).all()


def test_index_names_the_class(tmp_path: Path) -> None:
    torch.save({"weight": torch.eye(3), "bias": torch.tensor([4.0, 0.0, 0.0])}, tmp_path / "head.pth")
    e_ND = np.array([[1.0, 0.0, 0.0]])
    probability = [float(scores(Watermark(head="head.pth", index=i), tmp_path, e_ND)[0]) for i in range(3)]
    assert probability[0] > 0.9
    assert sum(probability) == pytest.approx(1)
    with pytest.raises(ValueError, match="watermark: index 3 is none of the 3 outputs"):
        Watermark(head="head.pth", index=3).open(Context(models=(str(tmp_path),)))


def test_huge_logits_stay_finite(tmp_path: Path) -> None:
    torch.save({"weight": torch.full((1, 2), 1e4), "bias": torch.zeros(1)}, tmp_path / "head.pth")
    found = scores(Safety(head="head.pth"), tmp_path, np.array([[1.0, 1.0], [-1.0, -1.0]]))
    assert found.tolist() == [1.0, 0.0]


def test_every_head_says_its_scale() -> None:
    for stage in (Safety(head="x"), Watermark(head="x")):
        assert [column.scale for column in stage.adds] == ["probability 0..1"]
