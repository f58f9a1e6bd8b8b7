"""The linear DiT against diffusers' SanaTransformer2DModel, its linear attention against a naive one in float64."""

from __future__ import annotations

import pytest
import torch
from diffusers import SanaTransformer2DModel

from tests.reference.linear_attention import naive_linear_attention
from training.linear_dit import (
    LinearDiT,
    LinearDiTConfig,
    linear_attention,
    load_diffusers_folder,
    save_diffusers_folder,
)

# (no qk-norm, + qk-norm, + qk-norm + guidance embedder), counted from diffusers on the meta device.
PARAMETERS = {
    "0.6B": (591_747_872, 591_876_896, 593_501_216),
    "1.6B": (1_604_462_752, 1_604_641_952, 1_610_237_472),
    "4.8B": (4_721_288_352, 4_721_825_952, 4_727_421_472),
}


def small(**changes) -> LinearDiTConfig:
    return LinearDiTConfig.named("tiny", **({"num_layers": 2, "caption_channels": 24} | changes))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach() - expected.detach()).abs().max() / expected.detach().abs().max())


def inputs(config: LinearDiTConfig, height: int = 6, width: int = 10, padded: bool = True):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, config.in_channels, height, width, generator=generator)
    text = torch.randn(3, 9, config.caption_channels, generator=generator)
    mask = torch.ones(3, 9)
    if padded:
        mask[1, 4:], mask[2, 1:] = 0, 0
    guidance = torch.tensor([0.4, 0.45, 0.5]) if config.guidance_embeds else None
    return x, torch.tensor([999.0, 412.5, 3.0]), text, mask, guidance


def both(config: LinearDiTConfig) -> tuple[LinearDiT, SanaTransformer2DModel]:
    """Ours and diffusers' with the same weights, loaded strictly in both directions."""
    torch.manual_seed(0)
    ours, theirs = LinearDiT(config), SanaTransformer2DModel(**config.to_diffusers_config())
    with torch.no_grad():
        for parameter in ours.parameters():  # norms, biases and the zero layers too, or their keys would not be tested
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


CASES = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "guidance": {"guidance_embeds": True},
    "qk_norm_guidance": {"qk_norm": True, "guidance_embeds": True},
    "positions": {"interpolation_scale": 1.0},
    "patch_2": {"patch_size": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_equal_diffusers(case):
    config = small(**CASES[case])
    ours, theirs = both(config)
    x, time, text, mask, guidance = inputs(config)  # H != W, neither is sample_size, two captions padded
    x_theirs, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = theirs(x_theirs, text, time, guidance=guidance, encoder_attention_mask=mask).sample
    found = ours(x_ours, time, text, mask, guidance)
    assert relative(found, expected) < 1e-5
    push = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    expected.backward(push)
    found.backward(push)
    assert relative(x_ours.grad, x_theirs.grad) < 1e-4
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    # A key's bias moves every score of a softmax alike: its gradient is zero but for rounding, hence the floor.
    floor = 1e-3 * max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        error = float((parameter.grad - gradients[name]).abs().max())
        assert error / max(float(gradients[name].abs().max()), floor) < 1e-4, name


def test_no_mask_is_a_mask_of_ones():
    ours, theirs = both(small())
    x, time, text, mask, _ = inputs(small(), padded=False)
    assert relative(ours(x, time, text), ours(x, time, text, mask)) < 1e-6
    assert relative(ours(x, time, text), theirs(x, text, time).sample) < 1e-5


def test_padded_text_changes_nothing():
    ours, _ = both(small())
    x, time, text, mask, _ = inputs(small())
    other = torch.where(mask[..., None] == 1, text, 100 * torch.randn_like(text))
    assert relative(ours(x, time, other, mask), ours(x, time, text, mask)) < 1e-6


def test_bf16_stays_close_to_float32_and_to_diffusers():
    ours, theirs = both(small(qk_norm=True))
    x, time, text, mask, _ = inputs(small())
    exact = ours(x, time, text, mask)
    half = ours.bfloat16()(x, time, text, mask)
    assert half.dtype == torch.bfloat16
    assert relative(half.float(), exact) < 2e-2
    expected = theirs.bfloat16()(x.bfloat16(), text.bfloat16(), time, encoder_attention_mask=mask).sample
    assert relative(half.float(), expected.float()) < 2e-2


def test_whole_float_timesteps_are_kept_in_bf16():
    """999 and 998 are one number in bf16; the sinusoid must be taken before the cast."""
    model = LinearDiT(small()).bfloat16()
    x, _, text, mask, _ = inputs(small())
    late, earlier = (model(x, torch.full((3,), t), text, mask).float() for t in (999.0, 998.0))
    assert not torch.equal(late, earlier)


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts(size):
    for expected, extra in zip(
        PARAMETERS[size], ({}, {"qk_norm": True}, {"qk_norm": True, "guidance_embeds": True}), strict=True
    ):
        with torch.device("meta"):
            model = LinearDiT(LinearDiTConfig.named(size, **extra), initialise=False)
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_tiny_is_about_1_7_million():
    model = LinearDiT(LinearDiTConfig.named("tiny"))
    assert 1.6e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.9e6


@pytest.mark.parametrize("tokens", [1, 64, 257])
def test_linear_attention_equals_naive_float64(tokens):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, tokens, 4, 32, requires_grad=True) for _ in range(3))
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    found, expected = linear_attention(q, k, v), naive_linear_attention(q64, k64, v64)
    assert relative(found.double(), expected) < 2e-6
    push = torch.randn(found.shape)
    found.backward(push)
    expected.backward(push.double())
    for fast, exact in ((q, q64), (k, k64), (v, v64)):
        # One token attends to itself alone: q and k then have no gradient but rounding.
        scale = max(float(exact.grad.abs().max()), 1.0)
        assert float((fast.grad.double() - exact.grad).abs().max()) / scale < 1e-5


def test_linear_attention_where_relu_leaves_nothing():
    q = -torch.ones(1, 4, 2, 8)
    out = linear_attention(q, torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8))
    assert torch.equal(out, torch.zeros_like(out))


def test_linear_attention_is_float32_under_autocast():
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 64, 4, 32) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_attention(q, k, v)
    assert out.dtype == torch.float32
    assert relative(out.double(), naive_linear_attention(q, k, v)) < 2e-6


def test_forward_mode_derivative_exists():
    """Consistency objectives take the derivative in (x, t) forwards; every operation must have one on the CPU."""
    model = LinearDiT(small(num_layers=1, qk_norm=True))
    x, time, text, mask, _ = inputs(small())
    direction = torch.randn_like(x)
    with torch.no_grad():
        _, tangent = torch.func.jvp(lambda y: model(y, time, text, mask), (x,), (direction,))
        double = model.double()
        step = 1e-6
        pair = [double((x + s * direction).double(), time, text, mask) for s in (step, -step)]
    # Kinks of ReLU make single numbers differ; as a whole the two derivatives are one.
    expected = (pair[0] - pair[1]) / (2 * step)
    assert float((tangent - expected).norm() / expected.norm()) < 0.05


def test_activation_checkpointing_changes_no_number():
    config = small(num_layers=3)
    torch.manual_seed(0)
    model = LinearDiT(config)
    x, time, text, mask, _ = inputs(config)
    model(x, time, text, mask).square().mean().backward()
    kept = [parameter.grad.clone() for parameter in model.parameters()]
    for every in (1, 2):
        model.zero_grad()
        model.checkpoint_activations(every)(x, time, text, mask).square().mean().backward()
        assert all(torch.equal(parameter.grad, old) for parameter, old in zip(model.parameters(), kept, strict=True))


def test_initialisation():
    torch.manual_seed(0)
    model = LinearDiT(small(guidance_embeds=True, qk_norm=True))
    assert torch.all(model.caption_norm.weight == 0.01)
    embedder = model.time_embed.guidance_embedder
    assert float(embedder.linear_1.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert torch.all(embedder.linear_2.weight == 0)
    for linear in (model.caption_projection.linear_1, model.time_embed.linear):
        assert float(linear.weight.std()) == pytest.approx(0.02, rel=0.05)
    block = model.transformer_blocks[0]
    assert float(block.scale_shift_table.std()) == pytest.approx(model.config.width**-0.5, rel=0.1)
    bound = (6 / (2 * model.config.width)) ** 0.5  # xavier uniform
    assert float(block.attn1.to_q.weight.abs().max()) == pytest.approx(bound, rel=0.01)
    x, time, text, mask, guidance = inputs(model.config)
    assert float(model(x, time, text, mask, guidance).abs().mean()) > 0.1  # no zero initialisation of the output
    # A guidance embedder starts without effect and can learn.
    other = model(x, time, text, mask, guidance * 2)
    assert torch.equal(other, model(x, time, text, mask, guidance))
    other.square().mean().backward()
    assert float(embedder.linear_2.weight.grad.abs().max()) > 0


def test_config_round_trip_and_refusals():
    for size in PARAMETERS:
        config = LinearDiTConfig.named(size, qk_norm=True, guidance_embeds=True, timestep_scale=0.001)
        assert LinearDiTConfig.from_diffusers_config(config.to_diffusers_config()) == config
    theirs = SanaTransformer2DModel(**small().to_diffusers_config())
    assert LinearDiTConfig.from_diffusers_config(dict(theirs.config)) == small()
    with pytest.raises(ValueError, match="attention_bias is True"):
        LinearDiTConfig.from_diffusers_config(small().to_diffusers_config() | {"attention_bias": True})
    with pytest.raises(ValueError, match="'rotary' is not one of"):
        LinearDiTConfig.from_diffusers_config(small().to_diffusers_config() | {"rotary": 1})
    with pytest.raises(ValueError, match="make the two products equal"):
        LinearDiTConfig(num_cross_attention_heads=3)
    with pytest.raises(ValueError, match="'2B' is not known: write one of tiny"):
        LinearDiTConfig.named("2B")


def test_folder_loads_in_diffusers_and_back(tmp_path):
    config = small(qk_norm=True)
    torch.manual_seed(0)
    model = LinearDiT(config)
    save_diffusers_folder(tmp_path / "transformer", config, model.state_dict())
    theirs = SanaTransformer2DModel.from_pretrained(tmp_path / "transformer")
    x, time, text, mask, _ = inputs(config)
    assert relative(theirs(x, text, time, encoder_attention_mask=mask).sample, model(x, time, text, mask)) < 1e-5
    theirs.save_pretrained(tmp_path / "again")
    again = load_diffusers_folder(tmp_path / "again")
    assert again.config == config
    assert torch.equal(again(x, time, text, mask), model(x, time, text, mask))
    with pytest.raises(ValueError, match="pass a transformer/ folder"):
        load_diffusers_folder(tmp_path)


def test_guidance_is_asked_for_and_refused():
    x, time, text, mask, _ = inputs(small())
    with pytest.raises(ValueError, match="called without guidance"):
        LinearDiT(small(guidance_embeds=True))(x, time, text, mask)
    with pytest.raises(ValueError, match="leave it out"):
        LinearDiT(small())(x, time, text, mask, torch.ones(3))
