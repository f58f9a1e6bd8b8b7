"""Feature spaces: the Inception network of FID, and any CLIP tower, as stages over the same decoded pictures.

    Inception(weights="pt_inception-2015-12-05.pth")     # inception.features (2048), inception.logits (1008)
    stages.clip_score.ClipScore(model="my-clip")         # clip.image_embedding: any open_clip tower

The network is the one that FID was defined with (TensorFlow's of 2015-12-05, as ported to PyTorch): torchvision's
layers, but the averages beside a border leave its padding out, and the last block takes a maximum. Its weights are a
file of the user's, a state dict; nothing is downloaded, nothing is unpickled beyond tensors.

Pictures are resized as clean-fid has it (Parmar et al., 2022): each channel apart, in float32, by Pillow's bicubic
filter with antialiasing, to 299 x 299, clipped to 0..255, then (x − 128) / 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from stages.contract import Batch, Column, Columns, Context, Measure, Resources, Stage
from stages.decode import upright_rgb

SIDE = 299
WIDTH = 2048
CLASSES = 1008


def clean_resize(picture: Image.Image, side: int = SIDE) -> np.ndarray:
    """(side, side, 3) float32 in 0..255 of an RGB picture."""
    channels = []
    for channel in np.moveaxis(np.asarray(picture, np.float32), -1, 0):
        resized = Image.fromarray(np.ascontiguousarray(channel), "F").resize((side, side), Image.Resampling.BICUBIC)
        channels.append(np.asarray(resized).clip(0, 255))
    return np.stack(channels, axis=-1)


def read_weights(file: Path) -> dict[str, Any]:
    """The tensors of a weights file: safetensors, or a pickle of tensors alone. Raises ValueError for anything else."""
    import torch

    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as problem:  # pickles, archives and damaged files fail in many ways; none is opened further
        reason = str(problem).splitlines()[0][:160] if str(problem) else type(problem).__name__
        raise ValueError(
            f"{file}: not a file of tensors ({reason}): give a state dict saved as safetensors, or by torch.save"
        ) from None
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file}: holds no state dict: expected tensors by name")
    return dict(state)


def inception_network(state: Mapping[str, Any]) -> Any:
    """The network with these weights, in evaluation mode: (B, 3, 299, 299) in -1..1 to (features, logits)."""
    import torch
    from torch.nn import functional
    from torchvision.models import inception

    def without_padding(x: torch.Tensor) -> torch.Tensor:
        return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def largest(x: torch.Tensor) -> torch.Tensor:
        return functional.max_pool2d(x, 3, stride=1, padding=1)

    def pooled(block: type, pool: Any) -> type:
        # torchvision's blocks end with their pooling branch: that one is computed again with the right pooling.
        def branches(self: Any, x: torch.Tensor) -> list[torch.Tensor]:
            return [*block._forward(self, x)[:-1], self.branch_pool(pool(x))]  # type: ignore[attr-defined]

        return type(f"Fid{block.__name__}", (block,), {"_forward": branches})

    a, c, e = (
        pooled(block, without_padding) for block in (inception.InceptionA, inception.InceptionC, inception.InceptionE)
    )
    blocks: Any = [inception.BasicConv2d, a, inception.InceptionB, c, inception.InceptionD, e, inception.InceptionAux]
    network = inception.Inception3(CLASSES, aux_logits=False, inception_blocks=blocks, init_weights=False)
    network.Mixed_7c = pooled(inception.InceptionE, largest)(WIDTH, conv_block=inception.BasicConv2d)
    wanted = network.state_dict()
    given = {name: value for name, value in state.items() if not name.startswith("AuxLogits.")}
    # Ports differ in whether they carry the counters of batch normalisation, which do nothing here.
    missing = [n for n in wanted if n not in given and not n.endswith("num_batches_tracked")]
    strange = [n for n in given if n not in wanted or given[n].shape != wanted[n].shape]
    if missing or strange:
        raise ValueError(
            f"inception: these are not the weights of FID's network: {len(missing)} missing (first {missing[:1]}), "
            f"{len(strange)} unknown or of another shape (first {strange[:1]})"
        )
    network.load_state_dict(given, strict=False)
    network.dropout = torch.nn.Identity()
    return network.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Inception(Stage):
    """Pooled features and unbiased logits (the last layer without its bias, as Inception Score has them)."""

    type: ClassVar[str] = "inception"
    resources: ClassVar[Resources] = Resources(cpus=1.0, memory_bytes=1 << 30)
    path_options: ClassVar[tuple[str, ...]] = ("weights_file",)
    adds: ClassVar[tuple[Column, ...]] = (
        Column("features", f"halffloat[{WIDTH}]", feature=True),
        Column("logits", f"halffloat[{CLASSES}]", feature=True),
    )
    weights_file: str
    compute_batch: int = 32

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image",)

    def weights(self, context: Context) -> Mapping[str, Path]:
        file = context.find(self.weights_file)
        return {file.name: file}

    def open(self, context: Context) -> Measure:
        import torch

        (file,) = self.weights(context).values()
        network = inception_network(read_weights(file)).to(context.device)
        pooled: list[Any] = []
        network.avgpool.register_forward_hook(lambda module, given, answer: pooled.append(answer.flatten(1)))

        def measure(batch: Batch) -> Columns:
            features: list[Any] = [None] * len(batch)
            logits: list[Any] = [None] * len(batch)
            errors: list[str | None] = [None] * len(batch)
            for start in range(0, len(batch), self.compute_batch):
                rows = range(start, min(start + self.compute_batch, len(batch)))
                pixels = torch.zeros(self.compute_batch, 3, SIDE, SIDE)
                for place, row in enumerate(rows):
                    picture = batch.image(row)
                    if picture is None:
                        errors[row] = batch.image_error(row) or "no picture"
                        continue
                    resized = clean_resize(upright_rgb(picture))
                    pixels[place] = (torch.from_numpy(resized).permute(2, 0, 1) - 128) / 128
                pooled.clear()
                with torch.inference_mode():
                    said = network(pixels.to(context.device)) - network.fc.bias
                found = pooled[0].float().cpu().numpy()
                for place, row in enumerate(rows):
                    if errors[row] is None:
                        features[row], logits[row] = found[place], said[place].float().cpu().numpy()
            return Columns({"features": features, "logits": logits}, errors)

        return measure
