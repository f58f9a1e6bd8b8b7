"""Latents of an autoencoder, computed once for every training run that uses it.

    stages:
      latents: {kind: dc_ae, folder: dc-ae-f32c32, dtype: bfloat16, resolution: 512, after: [near]}

A picture is made into pixels exactly as training would (stages.pixels: short side to `resolution`, bicubic, centre
crop) and encoded with the scaling factor in; augmentation is off: there is one crop and no flip, and a recipe of
training that reads the cache gets what it would have computed. Values are kept as float32, or as the bits of
bfloat16, which is what a bfloat16 autoencoder gives and half the size.

What comes out depends on picture, autoencoder and these options alone; the autoencoder's digest stands in the
snapshot's manifest, and training refuses a cache of another one. On a seeded sample of rows the loss of the
autoencoder is measured (`psnr`, `ssim`); a rule such as `{column: latents.psnr, at_least: 25, ...}` can judge by it,
and `least_psnr` ends the run when the mean of a shard's sample falls below.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from stages.autoencoders import Autoencoder, folder_files, open_autoencoder
from stages.contract import Batch, Column, Columns, Context, Measure, Resources, Stage
from stages.pixels import pixels_of


@dataclass(frozen=True, kw_only=True)
class Latents(Stage):
    """The scaled latent (C·h·w numbers, in that order) of every picture, and what the autoencoder loses on a sample.

    kind, folder, dtype, factor: the autoencoder (stages.autoencoders). resolution: of the square picture, in pixels.
    checked_fraction: share of pictures, chosen by image_id and seed, that are decoded again and compared. least_psnr:
    mean PSNR (dB) of a batch's checked pictures below which the run stops; 0 never does.
    """

    type: ClassVar[str] = "latents"
    resources: ClassVar[Resources] = Resources(cpus=1.0, gpus=1.0, memory_bytes=4 << 30)
    cpu_ms_per_row: ClassVar[float] = 500.0
    path_options: ClassVar[tuple[str, ...]] = ("folder",)
    kind: Literal["dc_ae", "pixel_shuffle"] = "dc_ae"
    folder: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    factor: int = 4
    resolution: int = 512
    checked_fraction: float = 0.01
    least_psnr: float = 0.0
    seed: int = 0
    compute_batch: int = 16

    def __post_init__(self) -> None:
        if (self.kind == "dc_ae") != bool(self.folder):
            raise ValueError(f"latents: kind {self.kind} with folder {self.folder!r}: a folder belongs to dc_ae alone")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image", "image_id")

    @property
    def adds(self) -> tuple[Column, ...]:  # type: ignore[override]
        kind = "float32[]" if self.dtype == "float32" else "uint16[]"
        return (
            Column("latent", kind, scale="scaled, C x h x w", feature=True),
            Column("channels", "int32"),
            Column("psnr", "float32", unit="dB"),
            Column("ssim", "float32", scale="0..1"),
        )

    def autoencoder_options(self) -> dict[str, Any]:
        """The options that open_autoencoder takes."""
        if self.kind == "pixel_shuffle":
            return {"type": "pixel_shuffle", "factor": self.factor}
        return {"type": "dc_ae", "folder": self.folder, "dtype": self.dtype}

    def weights(self, context: Context) -> Mapping[str, Path]:
        return folder_files(context.find(self.folder)) if self.kind == "dc_ae" else {}

    def estimate(self, context: Context, rows: int | None) -> str:
        width = 4 if self.dtype == "float32" else 2
        options = self.autoencoder_options()
        if self.kind == "dc_ae":
            return f"{self.dtype} latents of {self.resolution} px; augmentation is off (centre crop, no flips)"
        side = self.resolution // options["factor"]
        size = 3 * options["factor"] ** 2 * side * side * width
        return f"{size:,} bytes a sample; augmentation is off (centre crop, no flips)"

    def open(self, context: Context) -> Measure:
        autoencoder = open_autoencoder(self.autoencoder_options(), models=context.models, device=context.device)
        return lambda batch: self._measure(autoencoder, batch)

    def _measure(self, autoencoder: Autoencoder, batch: Batch) -> Columns:
        import torch

        rows = range(len(batch))
        errors: list[str | None] = [None] * len(batch)
        values: dict[str, list[Any]] = {column.name: [None] * len(batch) for column in self.adds}
        for start in range(0, len(batch), self.compute_batch):
            pixels_B3HW = torch.zeros(self.compute_batch, 3, self.resolution, self.resolution)
            part = rows[start : start + self.compute_batch]
            for place, row in enumerate(part):
                data = getattr(batch.images[row], "data", None)
                try:
                    if batch.header(row) is None or data is None:
                        raise ValueError(batch.image_error(row) or "no picture")
                    pixels_B3HW[place] = pixels_of(data, self.resolution)
                except (ValueError, OSError) as problem:
                    errors[row] = str(problem)[:200] or type(problem).__name__
                batch.images[row].release()
            with torch.no_grad():
                latents_BCHW = autoencoder.encode(pixels_B3HW).cpu()
            checked = [place for place, row in enumerate(part) if errors[row] is None and self._is_checked(batch, row)]
            losses = self._losses(autoencoder, pixels_B3HW, latents_BCHW, checked)
            for place, row in enumerate(part):
                if errors[row] is None:
                    values["latent"][row] = stored(latents_BCHW[place], self.dtype)
                    values["channels"][row] = autoencoder.latent_channels
                    values["psnr"][row], values["ssim"][row] = losses.get(place, (None, None))
        self._refuse_lossy([one for one in values["psnr"] if one is not None])
        return Columns(values, errors)

    def _is_checked(self, batch: Batch, row: int) -> bool:
        digest = hashlib.sha256(f"{self.seed}/{batch['image_id'][row]}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.checked_fraction * 2**64

    def _losses(self, autoencoder: Autoencoder, pixels: Any, latents: Any, places: list[int]) -> dict[int, Any]:
        """place -> (PSNR in dB, SSIM) of the pictures that come back from their latents."""
        if not places:
            return {}
        back = autoencoder.decode(latents[places]).cpu().numpy()
        return {
            place: (psnr(pixels[place].numpy(), again), ssim(pixels[place].numpy(), again))
            for place, again in zip(places, back, strict=True)
        }

    def _refuse_lossy(self, found: list[float]) -> None:
        if self.least_psnr and found and float(np.mean(found)) < self.least_psnr:
            raise ValueError(
                f"latents: pictures that come back from {self.folder or self.kind} have a PSNR of "
                f"{np.mean(found):.1f} dB on average, below the recipe's {self.least_psnr:g} (the worst has "
                f"{min(found):.1f}): is this the right autoencoder, dtype and resolution? Else lower least_psnr"
            )


def stored(latent_CHW: Any, dtype: str) -> np.ndarray:
    """A float32 tensor as the cache keeps it: flat, float32, or the bits of bfloat16."""
    import torch

    if dtype == "float32":
        return latent_CHW.flatten().numpy()
    return latent_CHW.to(torch.bfloat16).flatten().view(torch.int16).numpy().view(np.uint16)


def restored(values: np.ndarray) -> Any:
    """The flat float32 tensor that `stored` was given, to the precision that it kept."""
    import torch

    if values.dtype == np.uint16:
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16).float()
    return torch.from_numpy(values.astype(np.float32))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]; 100 for equal ones."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return min(100.0, 10 * float(np.log10(4 / error))) if error else 100.0


def ssim(one_CYX: np.ndarray, other_CYX: np.ndarray) -> float:
    """Structural similarity of pictures in [-1, 1] (Wang et al. 2004: Gaussian of 1.5 px, K 0.01 and 0.03), channels
    averaged, over the part that the 11-pixel window covers wholly."""
    from scipy.ndimage import gaussian_filter

    def blur(planes: np.ndarray) -> np.ndarray:
        blurred = gaussian_filter(planes, (0, 1.5, 1.5), truncate=3.5)
        return blurred[:, 5:-5, 5:-5] if min(planes.shape[1:]) > 10 else blurred

    x, y = one_CYX.astype(np.float64), other_CYX.astype(np.float64)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, both = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(similarity.mean())
