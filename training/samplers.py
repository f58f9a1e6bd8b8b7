"""Samplers: functions from a velocity field, noise and a grid of σ to an image latent.

A velocity field is `velocity(x_BCHW, sigma, time) -> v_BCHW`, σ and time (of 0..1000) plain floats shared by the batch;
`field_of` makes one from a network, a caption and a guidance scale. Solvers keep x in float32 and coefficients in
float64; they follow diffusers' `DPMSolverMultistepScheduler(use_flow_sigmas=True)`, so that a model drawn here and one
exported to `SanaPipeline` give the same image.

    grid = sigma_grid(steps=20, shift=3.0)
    x0 = flow_dpm_solver(field_of(model, text, mask, null_text, null_mask, guidance_scale=4.5), noise, grid)

Axes: B batch, C H W latent, L text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training import flow

VelocityField = Callable[[Tensor, float, float], Tensor]
Callback = Callable[[int, Tensor], None]  # step index, the x that step arrived at


@dataclass(frozen=True)
class SigmaGrid:
    """sigmas: N + 1 values falling to 0. times: the N times (of 0..1000) that the network is told."""

    sigmas: tuple[float, ...]
    times: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.times)


def sigma_grid(steps: int, shift: float, *, truncate: bool = True) -> SigmaGrid:
    """N steps even in unshifted σ from 0.999, shifted, then 0: the flow grid of diffusers' DPM-Solver.

    The first σ is never 1. truncate: times are whole numbers, int(1000·σ), as every diffusers pipeline feeds them;
    otherwise 1000·σ itself.
    """
    if steps < 1:
        raise ValueError(f"sampler: steps is {steps}: at least one is needed")
    even = [0.999 * (1 - i / steps) for i in range(steps)]
    sigmas = [shift * s / (1 + (shift - 1) * s) for s in even]
    times = [float(int(1000 * s)) if truncate else 1000 * s for s in sigmas]
    return SigmaGrid((*sigmas, 0.0), tuple(times))


def flow_dpm_solver(velocity: VelocityField, x: Tensor, grid: SigmaGrid, callback: Callback | None = None) -> Tensor:
    """Flow-DPM-Solver: DPM-Solver++(2M), midpoint, on data predictions (SANA, algorithm 1).

    With α = 1 − σ, λ = ln α − ln σ, h = λ_t − λ_s, r = h_previous / h:
        D = (1 + 1/2r)·X_i − (1/2r)·X_{i−1},    x_t = (σ_t/σ_s)·x_s + (α_t − α_s·σ_t/σ_s)·D
    where the bracket is −α_t·(e^{−h} − 1) written so that σ_t = 0 is harmless. First and last step are of first order,
    which for this process is Euler.
    """
    x = x.float()
    previous: Tensor | None = None
    lambdas = [math.log((1 - s) / s) if s > 0 else math.inf for s in grid.sigmas]
    for i, time in enumerate(grid.times):
        s, t = grid.sigmas[i], grid.sigmas[i + 1]
        data = x - s * velocity(x, s, time)
        direction = data
        if previous is not None and t > 0:
            r = (lambdas[i] - lambdas[i - 1]) / (lambdas[i + 1] - lambdas[i])
            direction = (1 + 0.5 / r) * data - (0.5 / r) * previous
        x = (t / s) * x + ((1 - t) - (1 - s) * t / s) * direction
        previous = data
        if callback is not None:
            callback(i, x)
    return x


def euler(velocity: VelocityField, x: Tensor, grid: SigmaGrid, callback: Callback | None = None) -> Tensor:
    """x_t = x_s + (σ_t − σ_s)·v: what DDIM and first-order DPM-Solver++ are for straight flows."""
    x = x.float()
    for i, time in enumerate(grid.times):
        s, t = grid.sigmas[i], grid.sigmas[i + 1]
        x = x + (t - s) * velocity(x, s, time)
        if callback is not None:
            callback(i, x)
    return x


def consistency(
    velocity: VelocityField, x: Tensor, grid: SigmaGrid, renoise: Sequence[Tensor], callback: Callback | None = None
) -> Tensor:
    """Few-step sampling of consistency students: predict x0, noise it afresh to the next σ, repeat.

    renoise: the N − 1 fresh noises, given from outside so that a drawing repeats.
    """
    if len(renoise) < grid.steps - 1:
        raise ValueError(f"consistency sampler: {grid.steps} steps need {grid.steps - 1} noises, {len(renoise)} given")
    x = x.float()
    for i, time in enumerate(grid.times):
        s, t = grid.sigmas[i], grid.sigmas[i + 1]
        data = x - s * velocity(x, s, time)
        x = data if t == 0 else (1 - t) * data + t * renoise[i].to(data)
        if callback is not None:
            callback(i, x)
    return x


def field_of(
    network: Any,
    text_BLC: Tensor,
    mask_BL: Tensor,
    null_text_BLC: Tensor | None = None,
    null_mask_BL: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> VelocityField:
    """The velocity field of a network for given captions.

    A network with a guidance embedder is told the scale. For any other, a scale other than 1 runs captions and null
    text together (v_u + w·(v_c − v_u)); a scale of 1 runs the captions alone: students that have guidance in them.
    """
    if flow.config_of(network).guidance_embeds:
        return lambda x, sigma, time: flow.velocity(
            network, x, x.new_full((len(x),), time), text_BLC, mask_BL, guidance_scale
        )
    if guidance_scale == 1.0:
        return lambda x, sigma, time: flow.velocity(network, x, x.new_full((len(x),), time), text_BLC, mask_BL)
    if null_text_BLC is None or null_mask_BL is None:
        raise ValueError(f"sampler: guidance_scale {guidance_scale} needs the encoded empty prompt beside the captions")
    null_text, null_mask = null_text_BLC, null_mask_BL
    return lambda x, sigma, time: flow.guided_velocity(
        network, x, x.new_full((len(x),), time), text_BLC, mask_BL, null_text, null_mask, guidance_scale
    )


SAMPLERS = ("flow_dpm_solver", "euler", "consistency")


def noise_for(seeds: Sequence[int], shape_CHW: Sequence[int], label: str = "start") -> Tensor:
    """(B, C, H, W) noise, a stream a seed: image i looks the same whatever is drawn beside it."""
    from training.objectives import Randomness

    return Randomness(0, 0, seeds).normal(label, *shape_CHW)


@torch.no_grad()
def sample(
    network: Any,
    text_BLC: Tensor,
    mask_BL: Tensor,
    null_text_LC: Tensor,
    null_mask_L: Tensor,
    *,
    seeds: Sequence[int],
    height: int,
    width: int,
    sampler: str = "flow_dpm_solver",
    steps: int = 20,
    guidance_scale: float = 4.5,
    flow_shift: float = 3.0,
    callback: Callback | None = None,
) -> Tensor:
    """Scaled latents x0 (B, C, height, width), float32, for B captions and as many seeds.

    height, width: of the latent. Network, text and noise are used on the network's own device.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is not known: write one of {', '.join(SAMPLERS)}")
    if len(seeds) != len(text_BLC):
        raise ValueError(
            f"sampler: {len(text_BLC)} captions but {len(seeds)} seeds were given: pass one seed a caption"
        )
    device = next(network.parameters()).device
    text, mask = text_BLC.to(device), mask_BL.to(device)
    null_text = null_text_LC.to(device).expand(len(text), -1, -1)
    null_mask = null_mask_L.to(device).expand(len(text), -1)
    shape = (flow.config_of(network).in_channels, height, width)
    x = noise_for(seeds, shape).to(device)
    grid = sigma_grid(steps, flow_shift)
    field = field_of(network, text, mask, null_text, null_mask, guidance_scale)
    if sampler == "flow_dpm_solver":
        return flow_dpm_solver(field, x, grid, callback)
    if sampler == "euler":
        return euler(field, x, grid, callback)
    renoise = [noise_for(seeds, shape, f"renoise-{i}").to(device) for i in range(steps - 1)]
    return consistency(field, x, grid, renoise, callback)
