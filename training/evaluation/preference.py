"""Learned preference: scores of how much people would like a picture for its prompt.

    stage = Preference(judge="pickscore", model="PickScore_v1")       # a folder that transformers saved
    stage = Preference(judge="hpsv2", model="HPS_v2.1_compressed.pt", tower="ViT-H-14")

PickScore (Kirstain et al., 2023) and HPSv2 (Wu et al., 2023) are CLIPs trained on people's choices: both score by the
cosine of the picture's and the prompt's embedding, PickScore times its own scale, HPSv2 times 100. ImageReward (Xu et
al., 2023) has a network of its own and is used where its package is installed. Weights come from local files alone.

Differences between two pictures of one prompt mean something (for PickScore, log odds of being chosen); averages over
prompts compare models, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stages.contract import Batch, Column, Columns, Context, Measure, Resources, Stage
from stages.decode import upright_rgb
from training.evaluation.features import read_weights

if TYPE_CHECKING:
    from PIL import Image

Judge = Literal["pickscore", "hpsv2", "image_reward"]
# (pictures, prompts) -> a score each.
Score = Callable[[Sequence["Image.Image"], Sequence[str]], list[float]]


@dataclass(frozen=True, kw_only=True)
class Preference(Stage):
    """A preference score a drawing. tower: open_clip's name of the network, where `model` is a bare weights file."""

    type: ClassVar[str] = "preference"
    adds: ClassVar[tuple[Column, ...]] = (Column("score", "float32", scale="the judge's own"),)
    resources: ClassVar[Resources] = Resources(cpus=1.0, memory_bytes=2 << 30)
    path_options: ClassVar[tuple[str, ...]] = ("model",)
    judge: Judge
    model: str
    tower: str = "ViT-H-14"
    compute_batch: int = 16

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image", "caption")

    def weights(self, context: Context) -> Mapping[str, Path]:
        found = context.find(self.model)
        if found.is_file():
            return {found.name: found}
        kinds = ("*.safetensors", "*.json", "*.txt", "*.pt")
        return {file.name: file for kind in kinds for file in sorted(found.glob(kind))}

    def open(self, context: Context) -> Measure:
        place = context.find(self.model)
        score = _image_reward(place, context) if self.judge == "image_reward" else self._clip(place, context)

        def measure(batch: Batch) -> Columns:
            scores: list[Any] = [None] * len(batch)
            errors: list[str | None] = [None] * len(batch)
            for start in range(0, len(batch), self.compute_batch):
                rows = list(range(start, min(start + self.compute_batch, len(batch))))
                for row in rows:
                    if batch.image(row) is None:
                        errors[row] = batch.image_error(row) or "no picture"
                sound = [row for row in rows if errors[row] is None]
                pictures = [upright_rgb(picture) for row in sound if (picture := batch.image(row))]
                # Every pass has one shape, so that a score depends on no neighbour.
                pad = self.compute_batch - len(sound)
                if not sound:
                    continue
                found = score([*pictures, *pictures[:1] * pad], [*(batch["caption"][r] for r in sound), *[""] * pad])
                for row, value in zip(sound, found, strict=False):
                    scores[row] = value
            return Columns({"score": scores}, errors)

        return measure

    def _clip(self, place: Path, context: Context) -> Score:
        return _transformers_clip(place, self.judge, context) if (place / "config.json").is_file() else _open_clip(
            place, self.tower, self.judge, context
        )  # fmt: skip


def _transformers_clip(folder: Path, judge: Judge, context: Context) -> Score:
    import torch
    from transformers import AutoProcessor, CLIPModel

    processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
    loaded: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    model = loaded.eval().to(context.device)
    scale = float(model.logit_scale.detach().exp()) if judge == "pickscore" else 100.0

    def score(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        length = model.config.text_config.max_position_embeddings
        given = processor(
            text=list(prompts), images=list(pictures), return_tensors="pt", padding="max_length", truncation=True,
            max_length=length,
        ).to(context.device)  # fmt: skip
        with torch.inference_mode():
            answer = model(**given)
        return _scores(answer.image_embeds, answer.text_embeds, scale)

    return score


def _open_clip(place: Path, tower: str, judge: Judge, context: Context) -> Score:
    import open_clip
    import torch
    from open_clip.transform import PreprocessCfg, image_transform_v2

    name = f"local-dir:{place}" if place.is_dir() else tower
    model = open_clip.create_model(name, device=context.device, require_pretrained=place.is_dir()).eval()
    if place.is_file():
        model.load_state_dict(read_weights(place))
    prepare: Any = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    tokenizer: Any = open_clip.get_tokenizer(name)
    scale = float(model.logit_scale.detach().exp()) if judge == "pickscore" else 100.0

    def score(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        pixels = torch.stack([prepare(picture) for picture in pictures]).to(context.device)
        with torch.inference_mode():
            images, texts = model.encode_image(pixels), model.encode_text(tokenizer(list(prompts)).to(context.device))
        return _scores(images, texts, scale)

    return score


def _scores(images_BD: Any, texts_BD: Any, scale: float) -> list[float]:
    from torch.nn.functional import cosine_similarity

    return [float(value) for value in scale * cosine_similarity(images_BD.float(), texts_BD.float(), dim=-1).cpu()]


def _image_reward(place: Path, context: Context) -> Score:
    try:
        import ImageReward  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(
            "preference: the judge image_reward needs its own package: pip install image-reward, or leave it out"
        ) from None
    model = ImageReward.load(str(place), device=context.device)
    return lambda pictures, prompts: [float(model.score(t, p)) for p, t in zip(pictures, prompts, strict=True)]
