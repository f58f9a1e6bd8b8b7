"""Models to evaluate: untrained, small, drawing 32x32 in a moment; and a peer in diffusers' format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.runner import SHIPPED_MODELS


def write_painter(folder: Path, *, seed: int = 0, steps: int = 2, lineage: dict[str, Any] | None = None) -> Path:
    """A model folder with random weights, over the shipped text encoder."""
    import torch

    from stages.autoencoders import open_autoencoder
    from stages.text_encoders import open_text_encoder
    from training.checkpoint import write_model
    from training.linear_dit import LinearDiT, LinearDiTConfig

    places = (str(SHIPPED_MODELS),)
    encoder = open_text_encoder({"folder": "text_encoder", "max_tokens": 24}, models=places)
    autoencoder = open_autoencoder({"type": "pixel_shuffle", "factor": 4})
    config = LinearDiTConfig(
        in_channels=48, out_channels=48, sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=16,
        num_cross_attention_heads=2, cross_attention_head_dim=16, caption_channels=encoder.channels,
    )  # fmt: skip
    torch.manual_seed(seed)
    network = LinearDiT(config)
    with torch.no_grad():
        for parameter in network.parameters():  # a new network's last layer is zero: it would draw its noise
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder.mkdir(parents=True)
    described = {
        "kind": "teacher",
        "name": folder.name,
        "method": "flow_matching",
        "sampling": {"sampler": "euler", "steps": steps, "guidance_scale": 1.0, "flow_shift": 3.0},
        "steps": steps,
        "resolution": 32,
        "autoencoder": autoencoder.describe(),
        "text_encoder": encoder.describe(),
        "trained_steps": 0,
        "lineage": lineage or {},
    }
    write_model(folder, config, network.state_dict(), described, None)
    return folder


def write_peer(folder: Path, text_encoder: Path) -> Path:
    """A SanaPipeline with random weights, as diffusers saves it."""
    import torch
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import AutoTokenizer, Gemma2Model

    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=32,
        sample_size=32, patch_size=1,
    )  # fmt: skip
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip
    pipeline = SanaPipeline(
        AutoTokenizer.from_pretrained(text_encoder), Gemma2Model.from_pretrained(text_encoder), vae, transformer,
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder
