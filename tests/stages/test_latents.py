"""The measures of loss against other implementations, what is kept, and when a lossy autoencoder stops a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stages.contract import Batch, Context
from stages.decode import EncodedImage
from stages.latents import Latents, psnr, restored, ssim, stored
from tests.pipelines import raw


@pytest.mark.parametrize("noise", [0.01, 0.2])
def test_losses_are_those_of_the_formulas(noise: float) -> None:
    """PSNR as torchmetrics has it; SSIM written out with a convolution over whole windows only."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    torch.manual_seed(0)
    coarse = torch.rand(1, 3, 6, 6) * 2 - 1
    picture = torch.nn.functional.interpolate(coarse, size=(48, 40), mode="bicubic").clamp(-1, 1)
    other = (picture + noise * torch.randn_like(picture)).clamp(-1, 1)
    theirs = float(peak_signal_noise_ratio(other, picture, data_range=2.0))
    assert psnr(picture[0].numpy(), other[0].numpy()) == pytest.approx(theirs, abs=1e-3)
    window = torch.exp(-(torch.arange(-5, 6).double() ** 2) / (2 * 1.5**2))
    window = torch.outer(window, window)[None, None] / window.sum() ** 2

    def mean(planes: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(planes[:, None], window)[:, 0]

    x, y = picture[0].double(), other[0].double()
    both = mean(x * y) - mean(x) * mean(y)
    spread = mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2
    index = (2 * mean(x) * mean(y) + 0.0004) * (2 * both + 0.0036)
    index = index / ((mean(x) ** 2 + mean(y) ** 2 + 0.0004) * (spread + 0.0036))
    assert ssim(picture[0].numpy(), other[0].numpy()) == pytest.approx(float(index.mean()), abs=1e-9)


def test_what_is_kept_comes_back() -> None:
    latent = torch.randn(4, 3, 5)
    assert torch.equal(restored(stored(latent, "float32")).reshape(4, 3, 5), latent)
    assert torch.equal(restored(stored(latent, "bfloat16")).reshape(4, 3, 5), latent.bfloat16().float())


def write_autoencoder(folder: Path) -> Path:
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        attention_head_dim=8,
        scaling_factor=0.41407,
    ).save_pretrained(folder)
    return folder


def test_a_lossy_autoencoder_stops_the_run(tmp_path: Path) -> None:
    write_autoencoder(tmp_path / "dc")
    context = Context(models=(str(tmp_path),))
    data = [raw.jpeg(raw.picture(number)) for number in range(3)] + [b"no picture"]
    batch = Batch({"image_id": list("abcd")}, [EncodedImage(one) for one in data])
    stage = Latents(folder="dc", resolution=16, checked_fraction=1.0)
    answer = stage.open(context)(batch)
    assert [None if one is None else len(one) for one in answer.values["latent"]] == [4 * 8 * 8] * 3 + [None]
    assert answer.errors == [None, None, None, "not an image of a known format"]
    worst = np.mean([one for one in answer.values["psnr"] if one is not None])
    assert worst < 20  # its weights are random
    with pytest.raises(ValueError, match="below the recipe's 30"):
        Latents(folder="dc", resolution=16, checked_fraction=1.0, least_psnr=30).open(context)(batch)


def test_a_folder_belongs_to_dc_ae_alone() -> None:
    with pytest.raises(ValueError, match="a folder belongs to dc_ae alone"):
        Latents()
