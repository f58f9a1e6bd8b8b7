"""Rectified flow between data and noise: the one convention that training, samplers and distillation share.

x0 is a latent times its autoencoder's scaling factor, ε ~ N(0, I), σ in [0, 1] and σ = 1 is pure noise:

    x_σ = (1 − σ)·x0 + σ·ε        v = ε − x0        x0 = x_σ − σ·v        ε = x_σ + (1 − σ)·v

Guidance: v_w = v_u + w·(v_c − v_u). The network is fed the timestep 1000·σ·timestep_scale, in float32 always.
Axes: B batch, C H W latent, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Network = Callable[..., Tensor]  # a LinearDiT, or a DeepSpeed engine around one


def per_sample(value_B: Tensor, like_BCHW: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1), to scale each sample of `like_BCHW`."""
    return value_B.view(-1, *[1] * (like_BCHW.ndim - 1))


def noised(x0_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """x_σ = (1 − σ)·x0 + σ·ε."""
    sigma = per_sample(sigma_B, x0_BCHW)
    return (1 - sigma) * x0_BCHW + sigma * noise_BCHW


def velocity_target(x0_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """v = ε − x0, the derivative of x_σ in σ."""
    return noise_BCHW - x0_BCHW


def data_from_velocity(x_BCHW: Tensor, v_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """x0 = x_σ − σ·v."""
    return x_BCHW - per_sample(sigma_B, x_BCHW) * v_BCHW


def noise_from_velocity(x_BCHW: Tensor, v_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """ε = x_σ + (1 − σ)·v."""
    return x_BCHW + (1 - per_sample(sigma_B, x_BCHW)) * v_BCHW


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """σ̃ = s·σ / (1 + (s − 1)·σ): more time at high noise for s > 1. logit(σ̃) = logit(σ) + ln s."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True, kw_only=True)
class SigmaSampling:
    """How training draws σ: u = sigmoid(mean + std·N(0,1)), then shifted; "uniform" draws u evenly.

    shift s and mean m are one knob: shift s equals mean m + ln s. floor_time feeds the network floor(1000·σ), as the
    released SANA weights were trained; x is noised with the exact σ either way.
    """

    kind: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 3.0
    floor_time: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("logit_normal", "uniform"):
            raise ValueError(f"sigma sampling: kind is {self.kind!r}: write logit_normal or uniform")
        if not (self.shift > 0 and self.std > 0):
            raise ValueError(
                f"sigma sampling: shift {self.shift} and std {self.std} must both be above 0: shift 1 changes nothing"
            )

    def sigma(self, normal_B: Tensor) -> Tensor:
        """σ in (0, 1) from standard normal draws, float32. (Uniform u is the normal's own distribution function.)"""
        z = normal_B.double()
        u = torch.special.ndtr(z) if self.kind == "uniform" else torch.sigmoid(self.mean + self.std * z)
        return shifted(u, self.shift).float()


def time_of(sigma_B: Tensor, floor_time: bool = False) -> Tensor:
    """1000·σ in float32, truncated to a whole number with floor_time. bf16 would be off by 2 here: never cast it."""
    time_B = 1000.0 * sigma_B.float()
    return time_B.floor() if floor_time else time_B


def config_of(network: Any) -> Any:
    """The LinearDiTConfig of a network, also through wrappers (DeepSpeed and DDP keep the network in `.module`)."""
    while hasattr(network, "module"):
        network = network.module
    return network.config


def velocity(
    network: Network,
    x_BCHW: Tensor,
    time_B: Tensor,
    text_BLC: Tensor,
    text_mask_BL: Tensor | None = None,
    guidance: float | Tensor | None = None,
) -> Tensor:
    """v at (x_σ, 1000·σ), float32.

    time_B: 0 to 1000, float32; the network's timestep_scale is applied here. guidance: the scale w itself, for networks
    with a guidance embedder only (and then always).
    """
    config = config_of(network)
    embedded = None
    if config.guidance_embeds:
        if guidance is None:
            raise ValueError("this network has a guidance embedder: say which guidance scale it should draw with")
        w_B = torch.as_tensor(guidance, dtype=torch.float32, device=x_BCHW.device).expand(len(x_BCHW))
        embedded = w_B * config.guidance_embeds_scale
    return network(x_BCHW, time_B * config.timestep_scale, text_BLC, text_mask_BL, embedded).float()


def guided_velocity(
    network: Network,
    x_BCHW: Tensor,
    time_B: Tensor,
    text_BLC: Tensor,
    text_mask_BL: Tensor,
    null_text_BLC: Tensor,
    null_mask_BL: Tensor,
    scale: float | Tensor,
) -> Tensor:
    """v_w = v_u + w·(v_c − v_u) from one pass over a batch of 2B; float32. scale: w, one number or one a sample.

    At w = 1 the null text does not matter and is not run.
    """
    if not isinstance(scale, Tensor) and scale == 1.0:
        return velocity(network, x_BCHW, time_B, text_BLC, text_mask_BL)
    unconditional, conditional = velocity(
        network,
        torch.cat([x_BCHW, x_BCHW]),
        torch.cat([time_B, time_B]),
        torch.cat([null_text_BLC, text_BLC]),
        torch.cat([null_mask_BL, text_mask_BL]),
    ).chunk(2)
    w = per_sample(scale, x_BCHW) if isinstance(scale, Tensor) else scale
    return unconditional + w * (conditional - unconditional)
