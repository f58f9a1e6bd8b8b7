"""Flow matching's identities and the sampling of σ."""

from __future__ import annotations

import math

import pytest
import torch

from training import flow
from training.linear_dit import LinearDiT, LinearDiTConfig


def test_identities():
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 4, 3, 5, 6, dtype=torch.float64)
    sigma = torch.rand(4, dtype=torch.float64)
    x, v = flow.noised(x0, noise, sigma), flow.velocity_target(x0, noise)
    torch.testing.assert_close(flow.data_from_velocity(x, v, sigma), x0)
    torch.testing.assert_close(flow.noise_from_velocity(x, v, sigma), noise)
    torch.testing.assert_close(flow.noised(x0, noise, torch.ones(4)), noise)
    torch.testing.assert_close(flow.noised(x0, noise, torch.zeros(4)), x0)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.0])
def test_shift_adds_its_logarithm_to_the_logit(shift):
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(torch.logit(flow.shifted(u, shift)), torch.logit(u) + math.log(shift))


def test_shift_3_is_a_logit_normal_of_mean_ln_3():
    z = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    shifted = flow.SigmaSampling(shift=3.0).sigma(z)
    moved = flow.SigmaSampling(shift=1.0, mean=math.log(3.0)).sigma(z)
    torch.testing.assert_close(shifted, moved)
    assert float(shifted.median()) == pytest.approx(0.75, abs=0.03)


def test_uniform_sampling_is_even():
    z = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    sigma = flow.SigmaSampling(kind="uniform", shift=1.0).sigma(z)
    counts = torch.histc(sigma, bins=10, min=0, max=1)
    assert float(counts.min()) > 1800
    assert float(counts.max()) < 2200


def test_refusals():
    with pytest.raises(ValueError, match="kind is 'cosine': write logit_normal or uniform"):
        flow.SigmaSampling(kind="cosine")
    with pytest.raises(ValueError, match="must both be above 0"):
        flow.SigmaSampling(shift=0)


def test_time_is_float32_and_floors_on_request():
    sigma = torch.tensor([0.9995, 0.5, 0.0004])
    assert flow.time_of(sigma).dtype == torch.float32
    torch.testing.assert_close(flow.time_of(sigma), torch.tensor([999.5, 500.0, 0.4]))
    assert flow.time_of(sigma, floor_time=True).tolist() == [999.0, 500.0, 0.0]


class Wrapper(torch.nn.Module):
    """What DeepSpeed and DDP look like from outside: the network in `.module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def test_guided_velocity_is_the_mixture_of_two_passes():
    torch.manual_seed(0)
    model = LinearDiT(LinearDiTConfig.named("tiny", num_layers=1, timestep_scale=0.001))
    x, time = torch.randn(3, 48, 4, 4), torch.tensor([999.0, 500.0, 20.0])
    text, null = torch.randn(2, 3, 5, 64)
    mask, null_mask = torch.ones(3, 5), torch.tensor([[1.0, 0, 0, 0, 0]]).expand(3, -1)
    conditional = model(x, time * 0.001, text, mask)
    unconditional = model(x, time * 0.001, null, null_mask)
    for network in (model, Wrapper(model)):
        found = flow.guided_velocity(network, x, time, text, mask, null, null_mask, 4.5)
        torch.testing.assert_close(found, unconditional + 4.5 * (conditional - unconditional), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            flow.guided_velocity(network, x, time, text, mask, null, null_mask, 1.0), conditional
        )
    each = flow.guided_velocity(model, x, time, text, mask, null, null_mask, torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(each[0], conditional[0], atol=1e-5, rtol=1e-4)


def test_guidance_embedder_gets_the_scaled_weight():
    torch.manual_seed(0)
    model = LinearDiT(LinearDiTConfig.named("tiny", num_layers=1, guidance_embeds=True))
    torch.nn.init.normal_(model.time_embed.guidance_embedder.linear_2.weight)
    x, time, text, mask = torch.randn(2, 48, 4, 4), torch.tensor([999.0, 3.0]), torch.randn(2, 5, 64), torch.ones(2, 5)
    found = flow.velocity(model, x, time, text, mask, guidance=4.5)
    torch.testing.assert_close(found, model(x, time, text, mask, torch.full((2,), 0.45)))
    with pytest.raises(ValueError, match="say which guidance scale"):
        flow.velocity(model, x, time, text, mask)
