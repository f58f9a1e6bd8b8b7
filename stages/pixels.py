"""Encoded pictures to what autoencoders and networks take: the one way, for training and for caches of latents."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def pixels_of(image: bytes, resolution: int) -> Tensor:
    """(3, resolution, resolution) float32 in [-1, 1]: RGB, the short side resized to the resolution (bicubic), centre
    crop.

    Transparent pixels are laid on white. Raises ValueError or OSError where the bytes do not decode.
    """
    import torch
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(image)) as opened:
        # A JPEG decoder can halve while it decodes; twice the target leaves bicubic enough to work with.
        opened.draft("RGB", (2 * resolution, 2 * resolution))
        picture: Image.Image = ImageOps.exif_transpose(opened)
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            rgba = picture.convert("RGBA")
            picture = Image.new("RGBA", rgba.size, "white")
            picture.alpha_composite(rgba)
        picture = picture.convert("RGB")
    width, height = picture.size
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    picture = picture.crop((left, top, left + resolution, top + resolution))
    array = np.asarray(picture, dtype=np.uint8)
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float().div_(127.5).sub_(1.0)
