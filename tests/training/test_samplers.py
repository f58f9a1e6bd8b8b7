"""Samplers against diffusers' scheduler, golden grids, and fields whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from training.linear_dit import LinearDiT, LinearDiTConfig
from training.samplers import consistency, euler, field_of, flow_dpm_solver, noise_for, sample, sigma_grid

# diffusers 0.42.1, 20 steps, flow_shift 3.
GOLDEN_SIGMAS = (
    ".999666 .982419 .963941 .944094 .922722 .899640 .874635 .847457 .817810 .785340 .749625 .710152 .666296 .617284 "
    ".562148 .499667 .428265 .345888 .249792 .136240 0"
)
GOLDEN_TIMES = "999 982 963 944 922 899 874 847 817 785 749 710 666 617 562 499 428 345 249 136"


def scheduler(shift: float, **options) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction", **options
    )


def curved(x, sigma, time):
    """A velocity field with nothing simple about it."""
    return torch.sin(x + 0.004 * time) - 0.3 * x + 0.1 * torch.roll(x, 1, -1)


def test_golden_grid():
    grid = sigma_grid(20, 3.0)
    assert grid.sigmas == pytest.approx([float(s) for s in GOLDEN_SIGMAS.split()], abs=6e-7)
    assert list(grid.times) == [float(t) for t in GOLDEN_TIMES.split()]
    assert list(sigma_grid(4, 3.0).times) == [999, 899, 749, 499]
    assert sigma_grid(4, 3.0, truncate=False).times[1] == pytest.approx(899.640, abs=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 4, 13, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_grid_is_diffusers(steps, shift):
    theirs = scheduler(shift)
    theirs.set_timesteps(steps)
    grid = sigma_grid(steps, shift)
    assert list(grid.times) == theirs.timesteps.tolist()
    assert grid.sigmas == pytest.approx(theirs.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("steps", "shift", "order"), [(20, 3.0, 2), (4, 3.0, 2), (20, 1.0, 2), (1, 3.0, 2), (20, 3.0, 1)]
)
def test_solver_is_diffusers_scheduler(steps, shift, order):
    theirs = scheduler(shift, solver_order=order)
    theirs.set_timesteps(steps)
    start = noise_for(range(3), (4, 6, 5))
    expected = start.clone()
    for time in theirs.timesteps:
        expected = theirs.step(curved(expected, 0.0, float(time)), time, expected).prev_sample
    solver = flow_dpm_solver if order == 2 else euler  # first order is Euler
    found = solver(curved, start, sigma_grid(steps, shift))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6


def test_solver_converges_faster_than_euler():
    start = noise_for([0], (1, 4, 4))
    exact = euler(curved, start, sigma_grid(4000, 1.0, truncate=False))
    errors = {
        (name, steps): float((solver(curved, start, sigma_grid(steps, 1.0, truncate=False)) - exact).abs().max())
        for name, solver in (("dpm", flow_dpm_solver), ("euler", euler))
        for steps in (20, 40)
    }
    assert errors["dpm", 20] < errors["euler", 20] / 2
    assert errors["euler", 20] / errors["euler", 40] == pytest.approx(2, rel=0.3)


def test_straight_flow_is_exact_in_one_step():
    """v = ε − x0 along the way: any sampler on any grid returns x0 up to the grid's first σ, which is just below 1."""
    x0, noise = noise_for([1], (2, 3, 3)), noise_for([2], (2, 3, 3))

    def field(x, sigma, time):
        return noise - x0

    for steps in (1, 3):
        grid = sigma_grid(steps, 3.0)
        start = (1 - grid.sigmas[0]) * x0 + grid.sigmas[0] * noise
        for solver in (euler, flow_dpm_solver):
            torch.testing.assert_close(solver(field, start, grid), x0, atol=2e-6, rtol=1e-5)


def test_consistency_renoises_with_what_it_is_given():
    """A field that always predicts x0 = 2: every step must land on noised 2s, the last on 2 itself."""
    grid = sigma_grid(3, 3.0)
    noises = [torch.full((1, 1, 1, 1), float(n)) for n in (5, -7)]
    seen = []

    def field(x, sigma, time):
        return (x - 2) / sigma

    out = consistency(field, torch.full((1, 1, 1, 1), 9.0), grid, noises, callback=lambda i, x: seen.append(float(x)))
    assert float(out) == pytest.approx(2)
    expected = [(1 - s) * 2 + s * n for s, n in zip(grid.sigmas[1:3], (5, -7), strict=True)]
    assert seen[:2] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="3 steps need 2 noises, 1 given"):
        consistency(field, torch.zeros(1, 1, 1, 1), grid, noises[:1])


@pytest.fixture(scope="module")
def drawing():
    torch.manual_seed(0)
    model = LinearDiT(LinearDiTConfig.named("tiny", num_layers=1)).eval()
    return {
        "network": model,
        "text_BLC": torch.randn(3, 5, 64),
        "mask_BL": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]),
        "null_text_LC": torch.randn(5, 64),
        "null_mask_L": torch.tensor([1, 0, 0, 0, 0]),
        "height": 4,
        "width": 6,
    }


@pytest.mark.parametrize("sampler", ["flow_dpm_solver", "euler", "consistency"])
def test_an_image_depends_on_its_own_seed_only(drawing, sampler):
    options = drawing | {"sampler": sampler, "steps": 3, "guidance_scale": 3.0}
    together = sample(**options, seeds=[7, 8, 9])
    assert together.shape == (3, 48, 4, 6)
    assert together.dtype == torch.float32
    alone = sample(**(options | {"text_BLC": options["text_BLC"][1:2], "mask_BL": options["mask_BL"][1:2]}), seeds=[8])
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sample(**options, seeds=[7, 18, 9])[1], together[1])


def test_scale_1_runs_the_captions_alone(drawing):
    model, passes = drawing["network"], []

    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, x, *rest):
            passes.append(len(x))
            return self.module(x, *rest)

    sample(**(drawing | {"network": Counting()}), seeds=[1, 2, 3], steps=4, guidance_scale=1.0)
    assert passes == [3] * 4
    passes.clear()
    sample(**(drawing | {"network": Counting()}), seeds=[1, 2, 3], steps=4, guidance_scale=2.0)
    assert passes == [6] * 4
    with pytest.raises(ValueError, match="needs the encoded empty prompt"):
        field_of(model, drawing["text_BLC"], drawing["mask_BL"], guidance_scale=2.0)


def test_refusals(drawing):
    with pytest.raises(ValueError, match="'ddim' is not known: write one of flow_dpm_solver, euler, consistency"):
        sample(**drawing, seeds=[1, 2, 3], sampler="ddim")
    with pytest.raises(ValueError, match="3 captions but 1 seeds"):
        sample(**drawing, seeds=[1])
    with pytest.raises(ValueError, match="at least one is needed"):
        sigma_grid(0, 3.0)


def test_lambda_form_and_stable_form_agree():
    """The update is written without λ at σ = 0; elsewhere it is −α_t(e^{−h} − 1) of the paper."""
    s, t = 0.75, 0.4
    h = math.log((1 - t) / t) - math.log((1 - s) / s)
    assert (1 - t) - (1 - s) * t / s == pytest.approx(-(1 - t) * (math.exp(-h) - 1))
