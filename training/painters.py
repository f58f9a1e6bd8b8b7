"""Painters: whatever draws pictures from prompts, opened once and asked often.

    painter = open_painter("runs/student", device="cpu")
    pictures = painter.draw(["a red circle"], seeds=[7])        # PIL images

A painter is a Sluice model, or any text-to-image pipeline that diffusers saved (a folder with model_index.json): a
peer. Picture i depends on prompt i and seed i; beside others it differs in its last bits at most, so whoever needs the
same bytes again draws the same prompts in the same call, on as many threads.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stages.contract import digest_of, file_digest, weights_digest

if TYPE_CHECKING:
    from PIL import Image

PEER_WEIGHTS = (".safetensors", ".json", ".txt", ".model")


class Painter(Protocol):
    """sampling: sampler, steps, guidance_scale and the like, as it will draw. weights_bytes: of all its networks."""

    sampling: dict[str, Any]
    weights_bytes: int

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]: ...


def describe_painter(address: str | Path) -> dict[str, Any]:
    """kind, name, digest, folder, sampling and lineage of a painter, without loading it.

    Raises ValueError where there is neither a model of ours nor a diffusers folder.
    """
    from training.checkpoint import find_model, read_model

    folder = Path(address).expanduser().absolute()
    if (folder / "model_index.json").is_file():
        return _describe_peer(folder)
    folder = find_model(folder)
    model = read_model(folder)
    named = {key: model.get(key) for key in ("kind", "name", "method", "digest", "resolution", "lineage")}
    return {**named, "folder": str(folder), "sampling": dict(model["sampling"])}


def open_painter(
    address: str | Path, *, device: str = "cpu", models: Sequence[str] = (), sampling: Mapping[str, Any] | None = None
) -> Painter:
    """Load a painter. sampling: what to draw by instead of its own (steps, guidance_scale, ...)."""
    described = describe_painter(address)
    asked = {**described["sampling"], **(sampling or {})}
    if described["kind"] == "peer":
        return DiffusersPainter(Path(described["folder"]), asked, device)
    return SluicePainter(Path(described["folder"]), asked, device, models)


class SluicePainter:
    """A model folder of ours: text encoder, linear DiT, autoencoder."""

    def __init__(self, folder: Path, sampling: dict[str, Any], device: str, models: Sequence[str] = ()) -> None:
        from stages.autoencoders import open_autoencoder
        from stages.text_encoders import open_text_encoder
        from training.checkpoint import read_model
        from training.linear_dit import load_diffusers_folder

        model = read_model(folder)
        places = (str(folder), *models)
        self.sampling, self.device = sampling, device
        self.autoencoder = open_autoencoder(model["autoencoder"], models=places, device=device)
        self.text_encoder = open_text_encoder(model["text_encoder"], models=places, device=device)
        self.network = load_diffusers_folder(folder / "transformer").to(device).eval()
        _, self.height, self.width = self.autoencoder.latent_shape(model["resolution"], model["resolution"])
        networks = [self.network, getattr(self.text_encoder, "model", None), getattr(self.autoencoder, "model", None)]
        self.weights_bytes = sum(_size(network) for network in networks if network is not None)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], **changes: Any) -> list[Image.Image]:
        import torch

        from training.samplers import sample

        text, mask = self.text_encoder.encode(list(prompts))
        null_text, null_mask = self.text_encoder.null()
        # Columns beyond the longest prompt are padding: they weigh 0 exactly, so they need not be run.
        length = max(int(mask.sum(-1).max()), int(null_mask.sum()), 1)
        with torch.inference_mode():
            latents = sample(
                self.network,
                text[:, :length],
                mask[:, :length],
                null_text[:length],
                null_mask[:length],
                seeds=list(seeds),
                height=self.height,
                width=self.width,
                **{**self.sampling, **changes},
            )
            return [as_picture(pixels) for pixels in self.autoencoder.decode(latents).cpu()]


class DiffusersPainter:
    """Any text-to-image pipeline that diffusers can load from a folder; safetensors only, and no code of its own."""

    def __init__(self, folder: Path, sampling: dict[str, Any], device: str) -> None:
        from diffusers import DiffusionPipeline

        self.pipeline: Any = DiffusionPipeline.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False
        ).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.sampling, self.device = sampling, device
        self.accepts = set(inspect.signature(self.pipeline.__call__).parameters)
        if "prompt" not in self.accepts:
            raise ValueError(f"{folder}: {type(self.pipeline).__name__} draws without a prompt: it cannot be compared")
        self.weights_bytes = sum(
            _size(part) for part in self.pipeline.components.values() if hasattr(part, "parameters")
        )

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], **changes: Any) -> list[Image.Image]:
        import torch

        given = {**self.sampling, **changes}
        names = {
            "steps": "num_inference_steps",
            "guidance_scale": "guidance_scale",
            "height": "height",
            "width": "width",
        }
        asked = {names[key]: value for key, value in given.items() if key in names and names[key] in self.accepts}
        # SANA's pipelines rewrite the prompt unless they are told not to: a peer draws what was asked.
        asked |= {"complex_human_instruction": None} if "complex_human_instruction" in self.accepts else {}
        asked |= {"use_resolution_binning": False} if "use_resolution_binning" in self.accepts else {}
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return list(self.pipeline(prompt=list(prompts), generator=generators, output_type="pil", **asked).images)


def as_picture(pixels_CHW: Any) -> Image.Image:
    """(3, H, W) in [-1, 1] as a PIL image."""
    import torch
    from PIL import Image

    whole = (pixels_CHW.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return Image.fromarray(whole.permute(1, 2, 0).contiguous().numpy())


def _describe_peer(folder: Path) -> dict[str, Any]:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in PEER_WEIGHTS)
    digest = weights_digest((str(path.relative_to(folder)), file_digest(path)) for path in files)
    return {
        "kind": "peer",
        "name": folder.name,
        "method": str(index.get("_class_name", "?")),
        "digest": digest_of("peer", digest),
        "resolution": None,
        "lineage": None,
        "folder": str(folder),
        "sampling": {},
    }


def _size(network: Any) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())
