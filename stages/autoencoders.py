"""Autoencoders: pictures to latents and back, behind one interface.

    autoencoder = open_autoencoder({"type": "pixel_shuffle", "factor": 4})
    latents_BCHW = autoencoder.encode(images_B3HW)      # images float in [-1, 1]; latents already times scaling_factor
    images_B3HW = autoencoder.decode(latents_BCHW)

Two kinds: "pixel_shuffle" moves pixels into channels and loses nothing (for small pictures), "dc_ae" is the deep
compression autoencoder (f32c32: 1024 px to 32x32x32) read from a local folder in diffusers' layout. Both are
deterministic; both have latents of roughly unit spread, which flow matching assumes.

torch is imported where it is used: describing an autoencoder costs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.contract import digest_of, file_digest, weights_digest

if TYPE_CHECKING:
    from torch import Tensor


class Autoencoder(ABC):
    """encode and decode are inverse up to the kind's loss; sides of pictures must be multiples of spatial_factor.

    spatial_factor: picture pixels a latent pixel, along one side. latent_channels: C. scaling_factor: what raw latents
    were multiplied by. digest: 32 hex digits over everything that decides the numbers.
    """

    spatial_factor: int
    latent_channels: int
    scaling_factor: float
    digest: str

    @abstractmethod
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Scaled latents (B, C, H/f, W/f), float32, from images in [-1, 1]."""

    @abstractmethod
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H·f, W·f), float32, clipped to [-1, 1], from scaled latents."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain JSON that `open_autoencoder` opens again: a folder by its name, not its path; with the digest."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latent of a picture of that size; ValueError if it does not divide."""
        f = self.spatial_factor
        if height % f or width % f:
            raise ValueError(
                f"autoencoder: a picture of {height}x{width} pixels is not a multiple of {f}: resize it to "
                f"{max(f, height // f * f)}x{max(f, width // f * f)}"
            )
        return self.latent_channels, height // f, width // f


@dataclass(frozen=True)
class PixelShuffle(Autoencoder):
    """Space-to-depth: factor² pixels of 3 colours become 3·factor² channels; nothing is lost.

    scaling_factor 2 brings the spread of ordinary pictures in [-1, 1] (about 0.5) to about 1.
    """

    factor: int = 4
    scale: float = 2.0

    def __post_init__(self) -> None:
        if self.factor < 1 or self.scale <= 0:
            raise ValueError(
                f"autoencoder pixel_shuffle: factor {self.factor} must be at least 1 and scale {self.scale} above 0"
            )

    @property
    def spatial_factor(self) -> int:  # type: ignore[override]
        return self.factor

    @property
    def latent_channels(self) -> int:  # type: ignore[override]
        return 3 * self.factor**2

    @property
    def scaling_factor(self) -> float:  # type: ignore[override]
        return self.scale

    @property
    def digest(self) -> str:  # type: ignore[override]
        return digest_of("autoencoder", "pixel_shuffle", self.factor, self.scale)

    def encode(self, images_B3HW: Tensor) -> Tensor:
        from torch.nn.functional import pixel_unshuffle

        self.latent_shape(*images_B3HW.shape[-2:])
        return pixel_unshuffle(images_B3HW.float(), self.factor) * self.scale

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        from torch.nn.functional import pixel_shuffle

        return (pixel_shuffle(latents_BCHW.float(), self.factor) / self.scale).clamp(-1, 1)

    def describe(self) -> dict[str, Any]:
        return {"type": "pixel_shuffle", "factor": self.factor, "scale": self.scale, "digest": self.digest}


class DeepCompression(Autoencoder):
    """DC-AE through `diffusers.AutoencoderDC`, loaded from a local folder (config.json and safetensors).

    Its latent is deterministic. dtype: "float32" or "bfloat16"; never float16, which DC-AE overflows.
    """

    def __init__(self, folder: Path | str, device: str = "cpu", dtype: str = "float32") -> None:
        import torch
        from diffusers import AutoencoderDC

        self.folder = Path(folder)
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"autoencoder dc_ae: dtype is {dtype!r}: DC-AE overflows in float16, write bfloat16 or float32"
            )
        if not (self.folder / "config.json").exists():
            raise ValueError(
                f"autoencoder dc_ae: {self.folder} has no config.json: "
                "name a folder that AutoencoderDC.save_pretrained wrote"
            )
        self.device, self.dtype_name = device, dtype
        self.model: Any = (
            AutoencoderDC.from_pretrained(self.folder, torch_dtype=getattr(torch, dtype)).to(device).eval()
        )
        self.model.requires_grad_(False)
        self.spatial_factor = 2 ** (len(self.model.config.encoder_block_out_channels) - 1)
        self.latent_channels = self.model.config.latent_channels
        self.scaling_factor = self.model.config.scaling_factor
        self.digest = digest_of("autoencoder", "dc_ae", _folder_digest(self.folder), dtype)

    def encode(self, images_B3HW: Tensor) -> Tensor:
        import torch

        self.latent_shape(*images_B3HW.shape[-2:])
        with torch.no_grad():
            latent = self.model.encode(images_B3HW.to(self.device, self.model.dtype)).latent
        return latent.float() * self.scaling_factor

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        import torch

        with torch.no_grad():
            images = self.model.decode((latents_BCHW / self.scaling_factor).to(self.device, self.model.dtype)).sample
        return images.float().clamp(-1, 1)

    def describe(self) -> dict[str, Any]:
        return {"type": "dc_ae", "folder": self.folder.name, "dtype": self.dtype_name, "digest": self.digest}


def _folder_digest(folder: Path) -> str:
    """One digest over the configuration and weights in a model folder, by file name."""
    return weights_digest((name, file_digest(path)) for name, path in folder_files(folder).items())


def folder_files(folder: Path) -> dict[str, Path]:
    """The files of a model folder that decide its numbers, by name."""
    return {path.name: path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors", ".model")}


def open_autoencoder(options: Mapping[str, Any], *, models: tuple[str, ...] = (), device: str = "cpu") -> Autoencoder:
    """The autoencoder of a recipe: {"type": "pixel_shuffle", "factor": 4} or {"type": "dc_ae", "folder": ...}.

    A relative folder is looked for in `models`. A "digest" among the options is checked against what was opened.
    """
    from stages.contract import Context

    given = dict(options)
    kind, expected = given.pop("type", None), given.pop("digest", None)
    try:
        if kind == "pixel_shuffle":
            opened: Autoencoder = PixelShuffle(**given)
        elif kind == "dc_ae":
            folder = Context(models=models).find(given.pop("folder"))
            opened = DeepCompression(folder, device=device, **given)
        else:
            raise ValueError(f"autoencoder.type is {kind!r}, which is not known: write pixel_shuffle or dc_ae")
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"autoencoder {kind}: {error}: check its options ({', '.join(given) or 'none given'})"
        ) from None
    if expected is not None and opened.digest != expected:
        raise ValueError(
            f"autoencoder {kind}: what was found has digest {opened.digest}, expected {expected}: "
            "the model was trained on latents of another autoencoder; point to that one"
        )
    return opened
