"""Progressive distillation (arXiv 2202.00512) in flow form, with the teacher's guidance baked in.

The student learns to cross one segment σ → σ' of a grid of `steps` in a single Euler step, where the teacher takes
`teacher_steps_per_step` guided solver steps. With x_σ the state at its start and x_σ' where the teacher arrives,

    v* = (x_σ − x_σ') / (σ − σ'),        loss = mean ‖ v_θ(x_σ, σ, c) − v* ‖²

A student of zero loss lands exactly on the teacher's points. It is called once a step, without guidance, on the very
grid it was trained on; first-order DPM-Solver++ on diffusers' flow grid is that sampler, so the export draws the same.
The classic halving is `teacher_steps_per_step=2` with each student as the next teacher; a larger jump spends more
teacher passes an update and saves the chain.

Where the states x_σ come from:
  - states="trajectory": the teacher runs from pure noise to the end and the student is taught every segment of that
    path. These are the states that the student will meet (guidance moves them away from noised data); the images of
    the batch are not looked at, only its captions.
  - states="data": noised images at one random segment a sample, as in the paper. Cheaper by `steps` an update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from training import flow
from training.objectives import Draw, Metrics, Objective, Phase, Randomness, TrainingBatch
from training.samplers import sigma_grid


@dataclass(frozen=True, kw_only=True)
class ProgressiveDistillation(Objective):
    """A student of `steps` Euler steps from a teacher of `steps * teacher_steps_per_step` guided solver steps.

    guidance_scale: the teacher's, baked into the student; 1 where the teacher is itself such a student.
    flow_shift: of the grid that both walk; best the one that the teacher is drawn with.
    """

    type: ClassVar[str] = "progressive"
    trained: ClassVar[tuple[str, ...]] = ("student",)
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    starts_from: ClassVar[Mapping[str, str]] = {"student": "teacher"}
    result: ClassVar[str] = "student"

    steps: int = 4
    teacher_steps_per_step: int = 4
    guidance_scale: float = 4.5
    flow_shift: float = 3.0
    states: str = "trajectory"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.teacher_steps_per_step < 1:
            raise ValueError(
                f"objective: steps is {self.steps} and teacher_steps_per_step {self.teacher_steps_per_step}: "
                "both must be at least 1"
            )
        if self.states not in ("trajectory", "data"):
            raise ValueError(f"objective.states is {self.states!r}: write trajectory or data")

    def draw(self, phase: Phase, batch: TrainingBatch, randomness: Randomness) -> Draw:
        noise = randomness.normal("noise", *batch.latents_BCHW.shape[1:])
        if self.states == "trajectory":
            return Draw({"noise": noise})
        return Draw({"noise": noise, "segment": randomness.integers("segment", below=self.steps)})

    def loss(
        self, phase: Phase, networks: Mapping[str, Any], batch: TrainingBatch, draw: Draw
    ) -> tuple[Tensor, Metrics]:
        m = self.teacher_steps_per_step
        noise = draw["noise"]
        sigmas, times = self._grid(noise.device)
        text, mask = batch.text_BLC, batch.mask_BL
        if self.states == "trajectory":
            start_B = torch.zeros(len(noise), dtype=torch.long, device=noise.device)
            path = [noise, *self._teacher_path(networks["teacher"], noise, start_B, self.steps * m, batch)[m - 1 :: m]]
            x, x_next = torch.cat(path[:-1]), torch.cat(path[1:])
            segment = torch.arange(self.steps, device=noise.device).repeat_interleave(len(noise))
            text, mask = text.repeat(self.steps, 1, 1), mask.repeat(self.steps, 1)
        else:
            segment = draw["segment"]
            x = flow.noised(batch.latents_BCHW, noise, sigmas[segment * m])
            x_next = self._teacher_path(networks["teacher"], x, segment * m, m, batch)[-1]
        start = segment * m
        v_target = (x - x_next) / flow.per_sample(sigmas[start] - sigmas[start + m], x)
        v = flow.velocity(networks["student"], x, times[start], text, mask)
        error = (v - v_target).square().mean(dim=(1, 2, 3))
        last = segment == self.steps - 1
        metrics = {"distil_loss": error.mean().detach()}
        if self.states == "trajectory":
            metrics["distil_loss_last_step"] = error[last].mean().detach()
        return error.mean(), metrics

    def _grid(self, device: Any) -> tuple[Tensor, Tensor]:
        """The teacher's σ and times; every `teacher_steps_per_step`-th is the student's, to the last digit."""
        grid = sigma_grid(self.steps * self.teacher_steps_per_step, self.flow_shift)
        return torch.tensor(grid.sigmas, device=device), torch.tensor(grid.times, device=device)

    @torch.no_grad()
    def _teacher_path(self, teacher: Any, x: Tensor, start_B: Tensor, count: int, batch: TrainingBatch) -> list[Tensor]:
        """The states after each of `count` guided DPM-Solver++(2M) steps; sample i begins at grid point start_B[i]."""
        sigmas, times = self._grid(x.device)
        lambdas = torch.log((1 - sigmas) / sigmas.clamp_min(1e-12))
        path: list[Tensor] = []
        previous = x
        for k in range(count):
            i = start_B + k
            s, t = (flow.per_sample(sigmas[j], x) for j in (i, i + 1))
            v = flow.guided_velocity(
                teacher,
                x,
                times[i],
                batch.text_BLC,
                batch.mask_BL,
                batch.null_text_BLC,
                batch.null_mask_BL,
                self.guidance_scale,
            )
            data = direction = x - s * v
            if k > 0:
                r = (lambdas[i] - lambdas[i - 1]) / (lambdas[i + 1] - lambdas[i])
                # The step to σ = 0 is of first order.
                weight = flow.per_sample(torch.where(sigmas[i + 1] > 0, 0.5 / r, torch.zeros_like(r)), x)
                direction = data + weight * (data - previous)
            x = (t / s) * x + ((1 - t) - (1 - s) * t / s) * direction
            previous = data
            path.append(x)
        return path

    def sampling(self) -> dict[str, Any]:
        return {"sampler": "euler", "steps": self.steps, "guidance_scale": 1.0, "flow_shift": self.flow_shift}
