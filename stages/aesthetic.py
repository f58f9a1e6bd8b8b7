"""Aesthetic score: a small head over CLIP image embeddings that are already measured.

    stages:
      clip:      {type: clip_score, model: ViT-L-14, pretrained: openai}
      aesthetic: {type: aesthetic, head: sac+logos+ava1-l14-linearMSE.pth, embedding: clip.image_embedding}

`head` is LAION's improved predictor (768-1024-128-64-16-1), one of LAION's linear heads, or the same layouts as
safetensors; layer sizes come from the file. None of these has an activation between its layers (the improved
predictor's published module leaves them out, and its weights were trained so), and dropout does nothing when scoring:
the whole head is one affine map, multiplied out in float64 when opened. So a row's score depends on no other row, and
takes no GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from stages.contract import Batch, Column, Columns, Context, Measure, Resources, Stage


@dataclass(frozen=True, kw_only=True)
class Aesthetic(Stage):
    """Aesthetic score on the head's scale (LAION's: about 1 to 10, most web pictures 4 to 6).

    head: weights file (.safetensors, or .pth read with weights_only), looked up in the model folders, or a folder with
    a model.safetensors. embedding: column of image embeddings of the CLIP that the head was trained on; brought to
    unit length here, as LAION does.
    """

    type: ClassVar[str] = "aesthetic"
    adds: ClassVar[tuple[Column, ...]] = (Column("score", "float32", scale="about 1..10"),)
    resources: ClassVar[Resources] = Resources(cpus=1.0)
    cpu_ms_per_row: ClassVar[float] = 0.02
    path_options: ClassVar[tuple[str, ...]] = ("head",)
    head: str
    embedding: str = "clip.image_embedding"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.embedding,)

    def weights(self, context: Context) -> Mapping[str, Path]:
        file = context.find(self.head)
        if file.is_dir():
            file = file / "model.safetensors"
            if not file.is_file():
                raise FileNotFoundError(f"aesthetic: {file.parent} has no model.safetensors; name the weights file")
        return {file.name: file}

    def open(self, context: Context) -> Measure:
        (file,) = self.weights(context).values()
        weight_D, bias = affine_of(read_head(file), file.name)

        def measure(batch: Batch) -> Columns:
            scores: list[Any] = [None] * len(batch)
            errors: list[str | None] = [None] * len(batch)
            for row, embedding in enumerate(batch[self.embedding]):
                if embedding is None:
                    errors[row] = f"no {self.embedding}"
                    continue
                e_D = np.asarray(embedding, np.float64)
                if e_D.shape != weight_D.shape:
                    raise ValueError(
                        f"aesthetic: {self.embedding} has {e_D.size} numbers, but {file.name} was trained on "
                        f"{weight_D.size}; use the head of that CLIP, or another `embedding`"
                    )
                length = float(np.sqrt((e_D * e_D).sum()))
                score = float((e_D * weight_D).sum()) / length + bias if length > 0 else float("nan")
                if np.isfinite(score):
                    scores[row] = score
                else:
                    errors[row] = "embedding without a direction"
            return Columns({"score": scores}, errors)

        return measure


def read_head(file: Path) -> dict[str, np.ndarray]:
    """Tensors of a weights file by name, as float64. Raises ValueError for a file that holds anything but tensors."""
    import torch

    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(file)
    else:
        # LAION's files were saved on a GPU; weights_only: a pickle from the net must not run code.
        state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"aesthetic: {file} holds no state dict; expected Linear weights and biases")
    return {name: value.double().numpy() for name, value in state.items()}


def affine_of(state: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, float]:
    """Weight (D,) and bias of the one map that a chain of Linear layers is, the layers in the order of their numbers.

    Raises ValueError unless the layers fit each other and end in one number.
    """
    layers = sorted((key.removesuffix("weight") for key in state if key.endswith("weight")), key=_numbers)
    shapes = ", ".join(f"{layer}weight {state[layer + 'weight'].shape}" for layer in layers)
    known = {layer + part for layer in layers for part in ("weight", "bias")}
    if not layers or set(state) - known or any(state[layer + "weight"].ndim != 2 for layer in layers):
        raise ValueError(
            f"aesthetic: {name} is no chain of Linear layers; it holds {', '.join(sorted(state)) or 'nothing'}"
        )
    weight_OD = state[layers[0] + "weight"]
    bias_O = state.get(layers[0] + "bias", np.zeros(len(weight_OD)))
    for layer in layers[1:]:
        next_OI = state[layer + "weight"]
        if next_OI.shape[1] != len(weight_OD):
            raise ValueError(f"aesthetic: layers of {name} do not fit each other: {shapes}")
        weight_OD = next_OI @ weight_OD
        bias_O = next_OI @ bias_O + state.get(layer + "bias", np.zeros(len(next_OI)))
    if len(weight_OD) != 1:
        raise ValueError(f"aesthetic: {name} ends in {len(weight_OD)} numbers instead of one score: {shapes}")
    return weight_OD[0], float(bias_O[0])


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)]
