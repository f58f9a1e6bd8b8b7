"""Heads: small networks over embeddings that are already measured, read from .safetensors or .pth files.

A head is a chain of Linear layers, stored as torch stores them (`0.weight`, `0.bias`, `2.weight`, ...): sizes come from
the file, their order from the numbers in their names. Heads are evaluated in float64, row by row: a row's score
depends on no other row and takes no GPU.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from stages.contract import Batch, Columns, Context, Measure, Resources, Stage

# (weight (outputs, inputs), bias (outputs,)) of each layer, in order.
Layers = Sequence[tuple[np.ndarray, np.ndarray]]


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
        raise ValueError(f"head {file} holds no state dict; expected Linear weights and biases")
    return {name: value.double().numpy() for name, value in state.items()}


def layers_of(state: Mapping[str, np.ndarray], name: str) -> Layers:
    """The Linear layers of a head, in the order of their numbers. Raises ValueError unless they fit each other."""
    names = sorted((key.removesuffix("weight") for key in state if key.endswith("weight")), key=_numbers)
    known = {layer + part for layer in names for part in ("weight", "bias")}
    if not names or set(state) - known or any(state[layer + "weight"].ndim != 2 for layer in names):
        raise ValueError(f"head {name} is no chain of Linear layers; it holds {', '.join(sorted(state)) or 'nothing'}")
    layers = [(state[layer + "weight"], _bias(state, layer)) for layer in names]
    for (before, _), (after, _) in itertools.pairwise(layers):
        if after.shape[1] != before.shape[0]:
            shapes = ", ".join(f"{layer}weight {state[layer + 'weight'].shape}" for layer in names)
            raise ValueError(f"layers of head {name} do not fit each other: {shapes}")
    return layers


def _bias(state: Mapping[str, np.ndarray], layer: str) -> np.ndarray:
    return state.get(layer + "bias", np.zeros(len(state[layer + "weight"])))


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)]


def affine_of(layers: Layers) -> tuple[np.ndarray, float]:
    """Weight (D,) and bias of the one map that layers without activations between them are. They end in one number."""
    weight_OD, bias_O = layers[0]
    for next_OI, next_O in layers[1:]:
        weight_OD, bias_O = next_OI @ weight_OD, next_OI @ bias_O + next_O
    return weight_OD[0], float(bias_O[0])


@dataclass(frozen=True, kw_only=True)
class HeadStage(Stage):
    """Base of stages that give one number, `score`, for an embedding.

    head: weights file, looked up in the model folders, or a folder with a model.safetensors. embedding: column of
    embeddings of the model that the head was trained on; brought to unit length here.
    """

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
                raise FileNotFoundError(
                    f"{self.type}: {file.parent} has no model.safetensors; name the weights file itself"
                )
        return {file.name: file}

    def scorer(self, layers: Layers, name: str) -> Callable[[np.ndarray], float]:
        """From an embedding (D,) of unit length to its score. Raises ValueError for layers that give no score."""
        raise NotImplementedError

    def open(self, context: Context) -> Measure:
        (file,) = self.weights(context).values()
        layers = layers_of(read_head(file), file.name)
        score = self.scorer(layers, file.name)
        width = layers[0][0].shape[1]

        def measure(batch: Batch) -> Columns:
            scores: list[Any] = [None] * len(batch)
            errors: list[str | None] = [None] * len(batch)
            for row, embedding in enumerate(batch[self.embedding]):
                if embedding is None:
                    errors[row] = f"no {self.embedding}"
                    continue
                e_D = np.asarray(embedding, np.float64)
                if e_D.shape != (width,):
                    raise ValueError(
                        f"{self.type}: {self.embedding} has {e_D.size} numbers, but {file.name} was trained on "
                        f"{width}; use the head of that CLIP, or another `embedding`"
                    )
                length = float(np.sqrt((e_D * e_D).sum()))
                value = score(e_D / length) if length > 0 else float("nan")
                if math.isfinite(value):
                    scores[row] = value
                else:
                    errors[row] = "embedding without a direction"
            return Columns({"score": scores}, errors)

        return measure


@dataclass(frozen=True, kw_only=True)
class Classifier(HeadStage):
    """Base of stages whose score is the probability of one class, 0 to 1.

    One output is read through a sigmoid, several through a softmax, of which `index` is the class asked for.
    activation: what stands between the layers; a file of weights does not say it.
    """

    activation: Literal["relu", "gelu", "none"] = "relu"
    index: int = -1

    def scorer(self, layers: Layers, name: str) -> Callable[[np.ndarray], float]:
        outputs = len(layers[-1][0])
        if not -outputs <= self.index < outputs:
            raise ValueError(f"{self.type}: index {self.index} is none of the {outputs} outputs of {name}")
        act = _ACTIVATIONS[self.activation]

        def probability(e_D: np.ndarray) -> float:
            x = e_D
            for weight_OI, bias_O in layers[:-1]:
                x = act((weight_OI * x).sum(axis=1) + bias_O)
            weight_OI, bias_O = layers[-1]
            logits_O = (weight_OI * x).sum(axis=1) + bias_O
            if outputs == 1:
                logits_O = np.array([0.0, logits_O[0]])
            powers = np.exp(logits_O - logits_O.max())
            return float(powers[self.index] / powers.sum())

        return probability


def _gelu(x: np.ndarray) -> np.ndarray:
    from scipy.special import erf

    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": _gelu,
    "none": lambda x: x,
}
