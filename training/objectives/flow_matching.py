"""Flow matching: regress the velocity ε − x0 at a random point of the straight line from data to noise.

    loss = mean ‖ v_θ(x_σ, σ, c) − (ε − x0) ‖²        σ from `training.flow.SigmaSampling`, no weighting

A caption is dropped with probability `caption_dropout`, which makes classifier-free guidance possible: the whole
caption is replaced by the encoded empty prompt. SANA leaves the dropped sample's mask as the caption's
(`dropped_mask="caption"`), so the null text is seen through masks of every length; "null" uses the empty prompt's own
mask, which is what samplers pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from training import flow
from training.objectives import Draw, Metrics, Objective, Phase, Randomness, TrainingBatch


@dataclass(frozen=True, kw_only=True)
class FlowMatching(Objective):
    """The teacher's objective. sample_steps, guidance_scale: how its model is drawn from unless told otherwise."""

    type: ClassVar[str] = "flow_matching"

    sigma: flow.SigmaSampling = field(default_factory=flow.SigmaSampling)
    caption_dropout: float = 0.1
    dropped_mask: str = "caption"
    guidance_scale: float = 4.5
    sample_steps: int = 20

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"objective.caption_dropout is {self.caption_dropout}: it is a probability, 0 to below 1")
        if self.dropped_mask not in ("caption", "null"):
            raise ValueError(f"objective.dropped_mask is {self.dropped_mask!r}: write caption or null")

    def draw(self, phase: Phase, batch: TrainingBatch, randomness: Randomness) -> Draw:
        return Draw(
            {
                "noise": randomness.normal("noise", *batch.latents_BCHW.shape[1:]),
                "sigma": self.sigma.sigma(randomness.normal("sigma")),
                "drop": randomness.uniform("drop") < self.caption_dropout,
            }
        )

    def loss(
        self, phase: Phase, networks: Mapping[str, Any], batch: TrainingBatch, draw: Draw
    ) -> tuple[Tensor, Metrics]:
        x0, noise, sigma_B, drop_B = batch.latents_BCHW, draw["noise"], draw["sigma"], draw["drop"]
        text = torch.where(drop_B[:, None, None], batch.null_text_BLC, batch.text_BLC)
        mask = batch.mask_BL
        if self.dropped_mask == "null":
            mask = torch.where(drop_B[:, None], batch.null_mask_BL, mask)
        x_sigma = flow.noised(x0, noise, sigma_B)
        v = flow.velocity(networks["model"], x_sigma, flow.time_of(sigma_B, self.sigma.floor_time), text, mask)
        loss = (v - flow.velocity_target(x0, noise)).square().mean()
        return loss, {"flow_loss": loss.detach()}

    def sampling(self) -> dict[str, Any]:
        return {
            "sampler": "flow_dpm_solver",
            "steps": self.sample_steps,
            "guidance_scale": self.guidance_scale,
            "flow_shift": self.sigma.shift,
        }
