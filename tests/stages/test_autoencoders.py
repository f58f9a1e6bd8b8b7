"""Autoencoders: pixel shuffle loses nothing; DC-AE is diffusers', read from a folder."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderDC

from stages.autoencoders import DeepCompression, PixelShuffle, open_autoencoder


@pytest.fixture(scope="module")
def dc_ae_folder(tmp_path_factory):
    """A random AutoencoderDC of two levels: 2 pixels a latent pixel, 4 channels."""
    torch.manual_seed(0)
    model = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41407,
    )
    folder = tmp_path_factory.mktemp("models") / "dc-ae"
    model.save_pretrained(folder)
    return folder


def test_pixel_shuffle_returns_the_picture():
    autoencoder = PixelShuffle(4)
    images = torch.rand(2, 3, 32, 24) * 2 - 1
    latents = autoencoder.encode(images)
    assert latents.shape == (2, *autoencoder.latent_shape(32, 24)) == (2, 48, 8, 6)
    torch.testing.assert_close(autoencoder.decode(latents), images)
    # Channel c·16 + i·4 + j is colour c of the pixel (i, j) in its cell.
    assert float(latents[0, 1 * 16 + 2 * 4 + 3, 5, 4]) == pytest.approx(2 * float(images[0, 1, 5 * 4 + 2, 4 * 4 + 3]))
    assert float(autoencoder.decode(latents * 10).abs().max()) == 1


def test_dc_ae_is_diffusers_latent_times_its_factor(dc_ae_folder):
    autoencoder = open_autoencoder({"type": "dc_ae", "folder": "dc-ae"}, models=(str(dc_ae_folder.parent),))
    model = AutoencoderDC.from_pretrained(dc_ae_folder).eval()
    assert (autoencoder.spatial_factor, autoencoder.latent_channels) == (2, 4)
    assert autoencoder.scaling_factor == pytest.approx(0.41407)
    images = torch.rand(2, 3, 16, 12) * 2 - 1
    with torch.no_grad():
        latent = model.encode(images).latent
        expected = model.decode(latent).sample.clamp(-1, 1)
    latents = autoencoder.encode(images)
    torch.testing.assert_close(latents, latent * 0.41407)
    assert torch.equal(latents, autoencoder.encode(images))  # no sampling
    torch.testing.assert_close(autoencoder.decode(latents), expected, atol=1e-5, rtol=1e-4)
    half = DeepCompression(dc_ae_folder, dtype="bfloat16")
    assert half.encode(images).dtype == torch.float32
    assert half.digest != autoencoder.digest


def test_descriptions_open_again_and_digests_are_checked(dc_ae_folder, tmp_path):
    models = (str(dc_ae_folder.parent),)
    for options in ({"type": "pixel_shuffle", "factor": 2}, {"type": "dc_ae", "folder": "dc-ae"}):
        opened = open_autoencoder(options, models=models)
        assert len(opened.digest) == 32
        assert open_autoencoder(opened.describe(), models=models).digest == opened.digest
        with pytest.raises(ValueError, match="another autoencoder"):
            open_autoencoder({**opened.describe(), "digest": "0" * 32}, models=models)
    assert PixelShuffle(4).digest != PixelShuffle(2).digest != PixelShuffle(2, 1.0).digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "vqgan"}, "'vqgan', which is not known: write pixel_shuffle or dc_ae"),
        ({"type": "pixel_shuffle", "facter": 4}, "facter"),
        ({"type": "pixel_shuffle", "factor": 0}, "must be at least 1"),
        ({"type": "dc_ae"}, "folder"),
    ],
)
def test_mistakes_are_answered(options, message):
    with pytest.raises(ValueError, match=message):
        open_autoencoder(options)


def test_refusals_name_what_to_do(dc_ae_folder, tmp_path):
    with pytest.raises(ValueError, match="30x33 pixels is not a multiple of 4: resize it to 28x32"):
        PixelShuffle(4).encode(torch.zeros(1, 3, 30, 33))
    with pytest.raises(ValueError, match="overflows in float16"):
        DeepCompression(dc_ae_folder, dtype="float16")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        DeepCompression(tmp_path)


def test_import_needs_no_torch():
    code = (
        "import sys, stages.autoencoders, stages.text_encoders; stages.autoencoders.PixelShuffle().digest; "
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
