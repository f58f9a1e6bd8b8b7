# ruff: noqa: N802, N815 - fields and properties that are tensors carry their axes
"""Objectives: what differs between flow matching and each distillation method. The loop is one and the same.

An objective names the networks it needs, which of them each phase trains, the random numbers it wants for a batch
(`draw`) and the loss of a phase given batch and draws (`loss`). The loop owns everything that has a lifetime: engines,
optimizers, EMA, checkpoints. It does, for every optimizer step,

    phase = objective.phase_at(step)                                   # decided before any work
    draw = objective.draw(phase, batch, Randomness(seed, step, batch.position_B))
    loss, metrics = objective.loss(phase, networks, batch, draw)       # networks: role -> engine or frozen module
    backward and step the engines of phase.trains; then objective.after_step(phase, networks, step)

Random numbers are drawn for each sample by itself from (seed, step, place in the global batch, label), on the CPU: one
worker or eight, this device or that, give the same numbers.

Frozen roles are plain modules in eval mode and without gradients. Where a phase sends gradients through a network that
it does not train (a discriminator in the generator's turn) the loop has frozen that network's parameters and passes
the module, not the engine; the other way pollutes its gradients.

Built in: "flow_matching" and "progressive". Others come by entry point `sluice.objectives`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

Metrics = dict[str, Tensor]  # detached scalars; the loop averages them over ranks and writes them out


@dataclass(frozen=True)
class Phase:
    """One kind of optimizer step. trains: roles whose weights it moves. steps: how many before the next phase."""

    name: str
    trains: tuple[str, ...]
    steps: int = 1


@dataclass
class TrainingBatch:
    """One micro-batch on one worker.

    latents_BCHW: x0, scaled latents, float32. text_BLC: text features, mask_BL: 1 for tokens that count.
    position_B: int64, each sample's place in the global batch of this optimizer step (0 .. global batch − 1).
    null_text_LC, null_mask_L: the encoded empty prompt, for caption dropout and guidance.
    """

    latents_BCHW: Tensor
    text_BLC: Tensor
    mask_BL: Tensor
    position_B: Tensor
    null_text_LC: Tensor
    null_mask_L: Tensor

    def __len__(self) -> int:
        return len(self.latents_BCHW)

    @property
    def null_text_BLC(self) -> Tensor:
        return self.null_text_LC.expand(len(self), -1, -1)

    @property
    def null_mask_BL(self) -> Tensor:
        return self.null_mask_L.expand(len(self), -1)

    def to(self, device: Any) -> TrainingBatch:
        return TrainingBatch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


class Randomness:
    """Random draws of one optimizer step, one stream a sample and label, the same whatever the number of workers."""

    def __init__(self, seed: int, step: int, position_B: Tensor | Sequence[int]) -> None:
        self.seed, self.step = seed, step
        self.positions = [int(position) for position in position_B]

    def _generator(self, label: str, position: int | None) -> torch.Generator:
        text = f"{self.seed}/{self.step}/{position}/{label}".encode()
        state = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
        return torch.Generator().manual_seed(state)

    def normal(self, label: str, *shape: int) -> Tensor:
        """(B, *shape) float32, standard normal."""
        return torch.stack([torch.randn(shape, generator=self._generator(label, place)) for place in self.positions])

    def uniform(self, label: str, *shape: int) -> Tensor:
        """(B, *shape) float32, even in [0, 1)."""
        return torch.stack([torch.rand(shape, generator=self._generator(label, place)) for place in self.positions])

    def integers(self, label: str, below: int) -> Tensor:
        """(B,) int64, even in 0 .. below − 1."""
        return (self.uniform(label).double() * below).long().clamp_max(below - 1)

    def shared_uniform(self, label: str) -> float:
        """One number for the whole global batch of this step, equal on every worker."""
        return float(torch.rand((), generator=self._generator(label, None)))


@dataclass
class Draw:
    """The random numbers of one loss by name (`draw["noise"]`), all with the batch axis first."""

    values: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def to(self, device: Any) -> Draw:
        return Draw({name: tensor.to(device, non_blocking=True) for name, tensor in self.values.items()})


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Base of every objective. Subclasses are frozen dataclasses; their fields are their part of a recipe's schema."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    type: ClassVar[str]
    # Roles: those trained start from the teacher where there is one (`starts_from`), the others are frozen.
    trained: ClassVar[tuple[str, ...]] = ("model",)
    frozen: ClassVar[tuple[str, ...]] = ()
    starts_from: ClassVar[Mapping[str, str]] = {}
    # The role whose EMA is sampled, evaluated and exported.
    result: ClassVar[str] = "model"

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("train", self.trained),)

    def phase_at(self, step: int) -> Phase:
        """The phase of optimizer step `step` (from 0): phases in turn, each for its number of steps."""
        place = step % sum(phase.steps for phase in self.phases)
        for phase in self.phases:
            if place < phase.steps:
                return phase
            place -= phase.steps
        raise AssertionError("an objective has at least one phase")

    @abstractmethod
    def draw(self, phase: Phase, batch: TrainingBatch, randomness: Randomness) -> Draw:
        """Every random number that `loss` will use."""

    @abstractmethod
    def loss(
        self, phase: Phase, networks: Mapping[str, Any], batch: TrainingBatch, draw: Draw
    ) -> tuple[Tensor, Metrics]:
        """A float32 scalar, the mean over the micro-batch, and what to log. Draws nothing by itself."""

    def after_step(self, phase: Phase, networks: Mapping[str, Any], step: int) -> None:  # noqa: B027
        """Called after the optimizer stepped; for targets that follow a network."""

    def sampling(self) -> dict[str, Any]:
        """How the result is to be drawn from: sampler, steps, guidance_scale, flow_shift (goes into model.json)."""
        return {}

    def options(self) -> dict[str, Any]:
        """The fields as plain JSON values, with the type: what run.json and lineage record."""
        return {"type": self.type, **asdict(self)}


def objective_types() -> dict[str, type[Objective]]:
    """Every objective by name: the built-in ones and those that other packages announce."""
    from importlib.metadata import entry_points

    from training.objectives.flow_matching import FlowMatching
    from training.objectives.progressive import ProgressiveDistillation

    found: dict[str, type[Objective]] = {kind.type: kind for kind in (FlowMatching, ProgressiveDistillation)}
    for point in entry_points(group="sluice.objectives"):
        found.setdefault(point.name, point.load())
    return found


def build_objective(options: Mapping[str, Any]) -> Objective:
    """An objective from `{"type": ..., option: ...}`; nested tables become their dataclasses.

    Raises ValueError for an unknown type or option, naming the nearest known one.
    """
    import difflib

    from pydantic import TypeAdapter, ValidationError

    types = objective_types()
    given = dict(options)
    kind = str(given.pop("type", ""))
    if kind not in types:
        near = difflib.get_close_matches(kind, types, n=1)
        hint = f": did you mean {near[0]!r}?" if near else f": write one of {', '.join(sorted(types))}"
        raise ValueError(f"objective.type is {kind!r}, which is not known{hint}")
    try:
        return TypeAdapter(types[kind]).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["objective", *map(str, first["loc"])])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            names = list(types[kind].__dataclass_fields__)
            near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(names)}"
            raise ValueError(f"{place}: {kind} has no such option; {hint}") from None
        raise ValueError(f"{place}: {first['msg']} (found {first['input']!r})") from None
