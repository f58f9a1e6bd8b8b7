"""The linear diffusion transformer (SANA, arXiv 2410.10629), written as one would read the paper.

A latent image is cut into tokens without positions; every block mixes them by ReLU linear attention (cost linear in the
number of tokens), looks at the caption by softmax cross-attention and ends in a Mix-FFN whose depthwise 3x3 convolution
is what tells the tokens where they are. The output is the velocity v = ε − x0 of flow matching (`training.flow`).

    config = LinearDiTConfig.named("tiny", caption_channels=64)
    model = LinearDiT(config)
    v_BCHW = model(x_BCHW, timestep_B, text_BLC, text_mask_BL)

Modules and state-dict keys are those of `diffusers.SanaTransformer2DModel` (0.42), so that importing and exporting
weights is `load_state_dict(strict=True)` and nothing else. Matrix products run in the parameters' dtype; the linear
attention's products, norm variances and the timestep sinusoid are always float32 (bf16 loses 3e-3 there, fp16 overflows
at 16k tokens), also under autocast.

Axes: B batch, C latent channels, H W latent height and width, N = H·W/patch² image tokens, D width, L text tokens,
h heads, d channels a head, m FFN hidden channels.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Widths, depths and head splits of SANA's published sizes; "tiny" is what two CPU cores train in minutes.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"num_layers": 6, "num_attention_heads": 4, "num_cross_attention_heads": 4, "cross_attention_head_dim": 32},
    "0.6B": {
        "num_layers": 28,
        "num_attention_heads": 36,
        "num_cross_attention_heads": 16,
        "cross_attention_head_dim": 72,
    },
    **{
        name: {
            "num_layers": depth,
            "num_attention_heads": 70,
            "num_cross_attention_heads": 20,
            "cross_attention_head_dim": 112,
        }
        for name, depth in {"1.6B": 20, "2.4B": 30, "3.2B": 40, "4.8B": 60}.items()
    },
}
# What the small world's pixel-shuffle autoencoder gives: 48 channels at 8x8.
TINY_LATENT = {"in_channels": 48, "out_channels": 48, "sample_size": 8, "caption_channels": 64}


@dataclass(frozen=True, kw_only=True)
class LinearDiTConfig:
    """Everything that decides the shape and the arithmetic of a `LinearDiT`.

    The first group has the names and defaults of diffusers' config.json; the second is ours and has no key there (the
    defaults are what diffusers computes, so only deviations would make an export draw differently).
    caption_norm_initial: where the caption norm's weight starts when training from scratch. SANA's 0.01 mutes the text
    for the first thousands of steps, which a run of fifteen hundred cannot afford.
    timestep_scale: the network is fed 1000·σ·timestep_scale; 0.001 makes that σ itself (Sprint-style teachers).
    """

    in_channels: int = 32
    out_channels: int = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    sample_size: int = 32
    patch_size: int = 1
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: bool = False
    timestep_scale: float = 1.0

    linear_attention_eps: float = 1e-15
    qk_norm_eps: float = 1e-5
    caption_norm_eps: float = 1e-5
    caption_norm_initial: float = 0.01

    def __post_init__(self) -> None:
        cross = self.num_cross_attention_heads * self.cross_attention_head_dim
        if cross != self.width:
            raise ValueError(
                f"LinearDiTConfig: cross-attention is {self.num_cross_attention_heads} heads x "
                f"{self.cross_attention_head_dim} = {cross} wide but the model is {self.num_attention_heads} x "
                f"{self.attention_head_dim} = {self.width}: make the two products equal"
            )

    @property
    def width(self) -> int:
        """D, the width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def ffn_width(self) -> int:
        """m, the hidden channels of the Mix-FFN after gating."""
        return int(self.mlp_ratio * self.width)

    @classmethod
    def named(cls, size: str, **overrides: Any) -> LinearDiTConfig:
        """A published size ("0.6B", "1.6B", "2.4B", "3.2B", "4.8B") or "tiny", with fields replaced by `overrides`."""
        if size not in SIZES:
            raise ValueError(f"model size {size!r} is not known: write one of {', '.join(SIZES)}")
        base: dict[str, Any] = {**SIZES[size], **(TINY_LATENT if size == "tiny" else {})}
        return cls(**(base | overrides))

    def with_(self, **changes: Any) -> LinearDiTConfig:
        return replace(self, **changes)

    def to_diffusers_config(self) -> dict[str, Any]:
        """The keyword arguments of `SanaTransformer2DModel`, which are also the content of its config.json."""
        ours = {"linear_attention_eps", "qk_norm_eps", "caption_norm_eps", "caption_norm_initial"}
        config = {name: value for name, value in asdict(self).items() if name not in ours}
        return config | {
            "qk_norm": "rms_norm_across_heads" if self.qk_norm else None,
            "cross_attention_dim": self.width,
            "dropout": 0.0,
            "attention_bias": False,
            "norm_elementwise_affine": False,
        }

    @classmethod
    def from_diffusers_config(cls, config: dict[str, Any]) -> LinearDiTConfig:
        """Read a config.json of `SanaTransformer2DModel`; private keys (`_class_name`, ...) are ignored.

        Raises ValueError where the file asks for something that this model does not compute.
        """
        given = {name: value for name, value in config.items() if not name.startswith("_")}
        only = {
            "dropout": (0.0, None),
            "attention_bias": (False, None),
            "norm_elementwise_affine": (False, None),
            "qk_norm": (None, "rms_norm_across_heads"),
        }
        for name, allowed in only.items():
            if name in given and given[name] not in allowed:
                raise ValueError(
                    f"transformer/config.json: {name} is {given[name]!r}, but LinearDiT computes only "
                    f"{' or '.join(map(repr, allowed))}: this is not a SANA checkpoint that can be imported"
                )
        given["qk_norm"] = given.get("qk_norm") is not None
        given["out_channels"] = given.get("out_channels") or given.get("in_channels", 32)
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(given) - known - {"dropout", "attention_bias", "norm_elementwise_affine"})
        cross_attention_dim = given.pop("cross_attention_dim", None)
        unknown = [name for name in unknown if name != "cross_attention_dim"]
        if unknown:
            raise ValueError(f"transformer/config.json: key {unknown[0]!r} is not one of SanaTransformer2DModel's")
        built = cls(**{name: value for name, value in given.items() if name in known})
        if cross_attention_dim not in (None, built.width):
            raise ValueError(
                f"transformer/config.json: cross_attention_dim is {cross_attention_dim}, expected the "
                f"width, {built.width}"
            )
        return built


def sinusoid(timestep_B: Tensor, channels: int = 256) -> Tensor:
    """(B, channels) float32: cos then sin of timestep · exp(−ln(10000)·i/half). In bf16 0..999 would be off by 2."""
    half = channels // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timestep_B.device) / half)
    angle = timestep_B.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def sincos_positions(height: int, width: int, channels: int, base: int, scale: float, device: Any = None) -> Tensor:
    """(1, height·width, channels) float32 two-dimensional sine-cosine positions; the horizontal half comes first.

    base: the grid side for which positions are 0, 1, 2, ...; other grids are stretched onto it (2K and 4K models only).
    """
    omega = 10000.0 ** (-torch.arange(channels // 4, dtype=torch.float64, device=device) / (channels / 4))
    y = torch.arange(height, dtype=torch.float32, device=device) / (height / base) / scale
    x = torch.arange(width, dtype=torch.float32, device=device) / (width / base) / scale

    def encode(place: Tensor) -> Tensor:
        angle = place.double()[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    across = encode(x)[None, :, :].expand(height, -1, -1)
    down = encode(y)[:, None, :].expand(-1, width, -1)
    return torch.cat([across, down], dim=-1).reshape(1, height * width, channels).float()


def linear_attention(q_BNhd: Tensor, k_BNhd: Tensor, v_BNhd: Tensor, eps: float = 1e-15) -> Tensor:
    """ReLU linear attention (SANA eq. 2), float32 whatever comes in: O_i = Σ_j v_j (k_j·q_i) / (Σ_j k_j·q_i + eps).

    Takes and returns (B, N, h, d); the result has the dtype of q. Cost O(N·d²) a head: the sum over j is taken once.
    A token whose q is all zero after ReLU gets 0 / eps = 0.
    """
    with torch.autocast(q_BNhd.device.type, enabled=False):
        q = F.relu(q_BNhd).float().transpose(1, 2)  # B h N d
        k = F.relu(k_BNhd).float().permute(0, 2, 3, 1)  # B h d N
        v = v_BNhd.float().transpose(1, 2)  # B h N d
        # A column of ones beside v makes numerator and denominator one pair of products.
        v1 = F.pad(v, (0, 1), value=1.0)  # B h N d+1
        out = q @ (k @ v1)
        out = out[..., :-1] / (out[..., -1:] + eps)
        return out.transpose(1, 2).to(q_BNhd.dtype)


def softmax_attention(q_BhNd: Tensor, k_BhLd: Tensor, v_BhLd: Tensor, bias_B11L: Tensor | None) -> Tensor:
    """Softmax attention with an additive bias, in the dtype of q.

    On the CPU written out in float32: there ATen's fused kernel has no forward-mode derivative and its bf16 backward
    takes eight times as long (36 against 4.5 ms for 64 images of 64 tokens, one Xeon core, torch 2.15).
    """
    if q_BhNd.device.type != "cpu":
        return F.scaled_dot_product_attention(q_BhNd, k_BhLd, v_BhLd, attn_mask=bias_B11L)
    with torch.autocast("cpu", enabled=False):
        scores_BhNL = (q_BhNd.float() * q_BhNd.shape[-1] ** -0.5) @ k_BhLd.float().transpose(-1, -2)
        if bias_B11L is not None:
            scores_BhNL = scores_BhNL + bias_B11L.float()
        return (scores_BhNL.softmax(dim=-1) @ v_BhLd.float()).to(q_BhNd.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis; the variance in float32, the product in the weight's dtype."""

    def __init__(self, width: int, eps: float, initial: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.initial = initial
        self.weight = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return (x * torch.rsqrt(variance + self.eps)).to(self.weight.dtype) * self.weight


class LinearSelfAttention(nn.Module):
    """`attn1`: q, k, v without bias, optional RMS norm of q and k over the full width, linear attention."""

    def __init__(self, config: LinearDiTConfig) -> None:
        super().__init__()
        D = config.width
        self.heads, self.eps = config.num_attention_heads, config.linear_attention_eps
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.norm_q = RMSNorm(D, config.qk_norm_eps) if config.qk_norm else None
        self.norm_k = RMSNorm(D, config.qk_norm_eps) if config.qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(D, D)])

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = self.to_q(x_BND), self.to_k(x_BND), self.to_v(x_BND)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))
        out = self.to_out[0](linear_attention(q, k, v, self.eps).flatten(2))
        # fp16 is not meant for training here; the clip keeps an fp16 export from spreading infinities.
        return out.clip(-65504, 65504) if out.dtype == torch.float16 else out


class CrossAttention(nn.Module):
    """`attn2`: softmax attention from image tokens to text tokens, all projections with bias."""

    def __init__(self, config: LinearDiTConfig) -> None:
        super().__init__()
        D = config.width
        self.heads = config.num_cross_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, D) for _ in range(3))
        self.norm_q = RMSNorm(D, config.qk_norm_eps) if config.qk_norm else None
        self.norm_k = RMSNorm(D, config.qk_norm_eps) if config.qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(D, D)])

    def forward(self, x_BND: Tensor, text_BLD: Tensor, bias_B11L: Tensor | None) -> Tensor:
        q, k, v = self.to_q(x_BND), self.to_k(text_BLD), self.to_v(text_BLD)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        out_BhNd = softmax_attention(q, k, v, bias_B11L)
        return self.to_out[0](out_BhNd.transpose(1, 2).flatten(2))


class MixFFN(nn.Module):
    """`ff` (GLUMBConv): 1x1 up to 2m, SiLU, depthwise 3x3, gate the one half by SiLU of the other, 1x1 down to D.

    SiLU acts on all 2m channels before the depthwise convolution and once more on the gate. Tokens stay channels-last
    all the way: the 1x1 convolutions are matrix products on (B, N, ·), their weights keep the 4-D shape of the format.
    """

    def __init__(self, config: LinearDiTConfig) -> None:
        super().__init__()
        D, m = config.width, config.ffn_width
        self.conv_inverted = nn.Conv2d(D, 2 * m, 1)
        self.conv_depth = nn.Conv2d(2 * m, 2 * m, 3, padding=1, groups=2 * m)
        self.conv_point = nn.Conv2d(m, D, 1, bias=False)

    def forward(self, x_BND: Tensor, height: int, width: int) -> Tensor:
        y = F.silu(F.linear(x_BND, self.conv_inverted.weight.flatten(1), self.conv_inverted.bias))
        y = self.conv_depth(y.unflatten(1, (height, width)).permute(0, 3, 1, 2))
        y, gate = y.permute(0, 2, 3, 1).flatten(1, 2).chunk(2, dim=-1)
        return F.linear(y * F.silu(gate), self.conv_point.weight.flatten(1))


class Block(nn.Module):
    """One transformer block; adaLN-single: a table of its own plus the timestep's six rows shared by all blocks."""

    def __init__(self, config: LinearDiTConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.attn1 = LinearSelfAttention(config)
        self.attn2 = CrossAttention(config)
        self.ff = MixFFN(config)
        self.scale_shift_table = nn.Parameter(torch.empty(6, config.width))

    def forward(
        self, x_BND: Tensor, text_BLD: Tensor, bias_B11L: Tensor | None, t_B6D: Tensor, height: int, width: int
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + t_B6D).chunk(6, dim=1)
        attended = self.attn1(modulated(layer_norm(x_BND, self.eps), scale1, shift1))
        x = torch.addcmul(x_BND, gate1, attended)
        x = x + self.attn2(x, text_BLD, bias_B11L)  # no norm, gate or modulation here: the FFN owns the second norm
        return torch.addcmul(x, gate2, self.ff(modulated(layer_norm(x, self.eps), scale2, shift2), height, width))


def layer_norm(x_BND: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights; ATen takes mean and variance in float32 also where x is bf16."""
    return F.layer_norm(x_BND, x_BND.shape[-1:], eps=eps)


def modulated(x_BND: Tensor, scale_B1D: Tensor, shift_B1D: Tensor) -> Tensor:
    """x·(1 + scale) + shift, one pass over x."""
    return torch.addcmul(shift_B1D, x_BND, 1 + scale_B1D)


class MLP(nn.Module):
    """linear_1, an activation, linear_2: the shape of every embedder here."""

    def __init__(self, inputs: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.act = activation
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


class TimeEmbed(nn.Module):
    """Timestep (and guidance) to (t6, e): six modulation rows for the blocks, and e for the output layer.

    The format keeps the timestep MLP under `emb.` without guidance and directly here with it; both are honoured.
    """

    def __init__(self, config: LinearDiTConfig) -> None:
        super().__init__()
        D = config.width
        self.guidance_embedder: MLP | None = None
        if config.guidance_embeds:
            self.timestep_embedder = MLP(256, D, nn.SiLU())
            self.guidance_embedder = MLP(256, D, nn.SiLU())
        else:
            self.emb = nn.ModuleDict({"timestep_embedder": MLP(256, D, nn.SiLU())})
        self.linear = nn.Linear(D, 6 * D)

    @property
    def timestep_mlp(self) -> MLP:
        module = self.timestep_embedder if self.guidance_embedder is not None else self.emb["timestep_embedder"]
        assert isinstance(module, MLP)
        return module

    def forward(self, timestep_B: Tensor, guidance_B: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = self.linear.weight.dtype
        e_BD = self.timestep_mlp(sinusoid(timestep_B).to(dtype))
        if self.guidance_embedder is not None:
            if guidance_B is None:
                raise ValueError(
                    "LinearDiT: this model has a guidance embedder but was called without guidance: "
                    "pass guidance_B = w · config.guidance_embeds_scale"
                )
            e_BD = e_BD + self.guidance_embedder(sinusoid(guidance_B).to(dtype))
        elif guidance_B is not None:
            raise ValueError(
                "LinearDiT: guidance was passed to a model whose config has guidance_embeds=False: leave it out"
            )
        t6 = self.linear(F.silu(e_BD))
        return t6.unflatten(-1, (6, -1)), e_BD


class PatchEmbed(nn.Module):
    def __init__(self, config: LinearDiTConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.width, p, stride=p)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.proj.kernel_size == (1, 1):  # a matrix product, and its result is channels-last as the blocks want it
            return F.linear(x_BCHW.flatten(2).transpose(1, 2), self.proj.weight.flatten(1), self.proj.bias)
        return self.proj(x_BCHW).flatten(2).transpose(1, 2)


class LinearDiT(nn.Module):
    """The network: (x_BCHW, timestep_B, text_BLC, text_mask_BL) to the velocity v_BCHW.

    checkpoint_every: 0 keeps all activations; n recomputes every n-th block (`checkpoint_activations`).
    """

    def __init__(self, config: LinearDiTConfig, *, initialise: bool = True) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_every = 0
        D = config.width
        self.patch_embed = PatchEmbed(config)
        self.time_embed = TimeEmbed(config)
        self.caption_projection = MLP(config.caption_channels, D, nn.GELU(approximate="tanh"))
        self.caption_norm = RMSNorm(D, config.caption_norm_eps, config.caption_norm_initial)
        self.transformer_blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.scale_shift_table = nn.Parameter(torch.empty(2, D))
        self.proj_out = nn.Linear(D, config.patch_size**2 * config.out_channels)
        if initialise:
            self.initialise()

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """NVlabs' initialisation. Gates and the last layer are not zero: the untrained output is not zero either."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):  # PyTorch's default, drawn from the given generator
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
                if module.bias is not None:
                    bound = 1 / math.sqrt(module.weight[0].numel())
                    nn.init.uniform_(module.bias, -bound, bound, generator=generator)
            elif isinstance(module, RMSNorm):
                nn.init.constant_(module.weight, module.initial)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1), generator=generator)
        small = [self.time_embed.timestep_mlp, self.caption_projection]
        for linear in [self.time_embed.linear, *(layer for mlp in small for layer in (mlp.linear_1, mlp.linear_2))]:
            nn.init.normal_(linear.weight, std=0.02, generator=generator)
        if self.time_embed.guidance_embedder is not None:
            self.initialise_guidance(generator)
        for table in [self.scale_shift_table, *(block.scale_shift_table for block in self.transformer_blocks)]:
            nn.init.normal_(table, std=self.config.width**-0.5, generator=generator)  # type: ignore[arg-type]

    def initialise_guidance(self, generator: torch.Generator | None = None) -> None:
        """First layer N(0, 0.02), second zero: guidance changes nothing yet and can still be learnt.

        Both zero would be a dead state: no gradient ever reaches the first layer.
        """
        embedder = self.time_embed.guidance_embedder
        if embedder is None:
            raise ValueError("LinearDiT: there is no guidance embedder to initialise: set guidance_embeds=True")
        nn.init.normal_(embedder.linear_1.weight, std=0.02, generator=generator)
        for parameter in (embedder.linear_1.bias, embedder.linear_2.weight, embedder.linear_2.bias):
            nn.init.zeros_(parameter)

    def checkpoint_activations(self, every: int = 1) -> LinearDiT:
        """Recompute every n-th block in the backward pass (1: all of them, least memory; 0: none)."""
        self.checkpoint_every = every
        return self

    def forward(
        self,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        text_BLC: Tensor,
        text_mask_BL: Tensor | None = None,
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        """The velocity at x, in the dtype of the parameters.

        x_BCHW: noised latents, any float dtype. timestep_B: 1000·σ·timestep_scale (`flow.timestep_of`), float32 or
        integer. text_BLC: text features. text_mask_BL: 1 where a text token counts, 0 for padding; None: all count.
        guidance_B: w·guidance_embeds_scale, only and always for a model with a guidance embedder.
        """
        p, dtype = self.config.patch_size, self.proj_out.weight.dtype
        B, _, H, W = x_BCHW.shape
        height, width = H // p, W // p
        x = self.patch_embed(x_BCHW.to(dtype))
        if self.config.interpolation_scale is not None:
            base, scale = self.config.sample_size // p, self.config.interpolation_scale
            x = x + sincos_positions(height, width, x.shape[-1], base, scale, x.device).to(dtype)
        t_B6D, e_BD = self.time_embed(timestep_B, guidance_B)
        text_BLD = self.caption_norm(self.caption_projection(text_BLC.to(dtype)))
        bias = None if text_mask_BL is None else ((1 - text_mask_BL.to(dtype)) * -10000.0)[:, None, None, :]

        for index, block in enumerate(self.transformer_blocks):
            if self.checkpoint_every and index % self.checkpoint_every == 0 and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, text_BLD, bias, t_B6D, height, width, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, text_BLD, bias, t_B6D, height, width)

        shift, scale = (self.scale_shift_table + e_BD[:, None]).chunk(2, dim=1)
        x = self.proj_out(modulated(layer_norm(x, 1e-6), scale, shift))
        v_BhwppC = x.reshape(B, height, width, p, p, self.config.out_channels)
        return v_BhwppC.permute(0, 5, 1, 3, 2, 4).reshape(B, self.config.out_channels, H, W)


def load_diffusers_folder(folder: Any) -> LinearDiT:
    """A `LinearDiT` from a folder with config.json and diffusion_pytorch_model.safetensors (diffusers' layout)."""
    import json
    from pathlib import Path

    from safetensors.torch import load_file

    folder = Path(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    if not weights.exists():
        raise ValueError(f"{folder}: there is no {weights.name}; pass a transformer/ folder in diffusers' layout")
    model = LinearDiT(
        LinearDiTConfig.from_diffusers_config(json.loads((folder / "config.json").read_text())), initialise=False
    )
    model.load_state_dict(load_file(weights), strict=True)
    return model


def save_diffusers_folder(folder: Any, config: LinearDiTConfig, state: dict[str, Tensor]) -> None:
    """Write `state` (keys of `LinearDiT`) as the transformer/ folder that `SanaTransformer2DModel` loads."""
    import json
    from pathlib import Path

    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "_class_name": "SanaTransformer2DModel",
        "_diffusers_version": "0.42.1",
        **config.to_diffusers_config(),
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
