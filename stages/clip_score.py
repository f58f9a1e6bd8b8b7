"""CLIP score: the cosine between a picture and its caption, and the picture's embedding for the stages behind it.

    stages:
      clip: {type: clip_score, model: ViT-L-14, pretrained: openai}     # clip.score, .text_tokens, .image_embedding
      tiny: {type: clip_score, model: my-clip}                          # a folder in open_clip's local format

`model` is a name that open_clip knows, for which `pretrained` is one of its tags or a weights file, or a folder with
open_clip_config.json and weights, looked up like every other weight (`--models FOLDER`). Pictures are turned upright,
laid on white and given to the model's own preprocessing. The image tower runs once a picture.

`preprocessing: fast` takes a reduced-size decode instead, resizes it bilinearly and hands bytes to the device. It costs
a fifth, and its scores are near the exact ones but not equal: docs/curate.md says by how much.

Every forward pass has the same shape: rows are cut in order into batches of `compute_batch`, the last one padded, and a
row without picture or caption leaves its place empty. So, given whole batches of a shard's rows in order, a row's
numbers depend on neither transport nor workers.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from stages.contract import Batch, Column, Columns, Context, Measure, PreparedMeasure, Resources, Stage
from stages.decode import REDUCED_SIDE, opencv, upright_rgb

if TYPE_CHECKING:
    import torch

LOCAL = "local-dir:"


@dataclass(frozen=True, kw_only=True)
class ClipScore(Stage):
    """Cosine of image and caption embeddings, text tokens and the L2-normalised image embedding of every pair.

    text_tokens counts what the text tower reads, start and end marks included; a caption longer than its context is cut
    there. precision is the towers' ("bf16" halves memory; embeddings are normalised and compared in fp32 either way).
    """

    type: ClassVar[str] = "clip_score"
    resources: ClassVar[Resources] = Resources(cpus=1.0, memory_bytes=2 << 30)
    path_options: ClassVar[tuple[str, ...]] = ("model", "pretrained")
    model: str = "ViT-L-14"
    pretrained: str = ""
    precision: Literal["fp32", "bf16"] = "fp32"
    preprocessing: Literal["exact", "fast"] = "exact"
    compute_batch: int = 64

    def __post_init__(self) -> None:
        if self.compute_batch < 16 or self.compute_batch % 16:
            raise ValueError(f"clip_score: compute_batch is {self.compute_batch}; it must be a positive multiple of 16")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"clip_score: precision is {self.precision!r}; expected fp32 or bf16")
        if self.preprocessing not in ("exact", "fast"):
            raise ValueError(f"clip_score: preprocessing is {self.preprocessing!r}; expected exact or fast")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image", "caption")

    @property
    def adds(self) -> tuple[Column, ...]:  # type: ignore[override]
        """Without a context: the embedding's length is known for open_clip's own names and for absolute folders, and is
        otherwise left open ("halffloat[]"); `columns(context)` knows it wherever the weights can be found."""
        return self.columns(Context())

    def columns(self, context: Context) -> tuple[Column, ...]:
        """The columns, the embedding with its length D where the model can be found."""
        try:
            width = str(_model_config(self._source(context))["embed_dim"])
        except FileNotFoundError:
            width = ""
        return (
            Column("score", "float32", scale="cosine -1..1"),
            Column("text_tokens", "int32", unit="tokens"),
            Column("image_embedding", f"halffloat[{width}]", scale="unit length", feature=True),
        )

    @property
    def cpu_ms_per_row(self) -> float:  # type: ignore[override]
        """An estimate for plans: multiplications of the image tower at 30 GMAC/s (fp32, one core); 100 if unknown."""
        try:
            vision = _model_config(self._source(Context()))["vision_cfg"]
            width, layers = vision["width"], int(vision["layers"])
            tokens = (int(vision["image_size"]) // int(vision["patch_size"])) ** 2 + 1
        except (FileNotFoundError, KeyError, TypeError, ValueError):
            return 100.0
        return float(layers * (12 * width**2 * tokens + 2 * width * tokens**2) / 30e6 + 2)

    def weights(self, context: Context) -> Mapping[str, Path]:
        """Configuration, weights and tokenizer of a folder; the weights file of a named model.

        Raises FileNotFoundError or ValueError where they cannot be found.
        """
        source = self._source(context)
        if isinstance(source, Path):
            # Every file that could be read: which of several weights files is taken is open_clip's affair.
            checkpoints = [file for kind in ("*.safetensors", "*.bin", "*.pth") for file in source.glob(kind)]
            if not checkpoints:
                raise ValueError(
                    f"clip_score: {source} has open_clip_config.json but no weights (*.safetensors) beside it"
                )
            texts = [file for kind in ("*.json", "*.txt", "*.model") for file in source.glob(kind)]
            return {file.name: file for file in sorted(checkpoints + texts)}
        file = self._checkpoint(context)
        return {file.name: file}

    def open(self, context: Context) -> Measure:
        return _Scorer(self, context)

    def is_b32(self, context: Context) -> bool:
        """Whether scores are on ViT-B/32's scale, by the architecture; False where the model cannot be found."""
        try:
            vision = _model_config(self._source(context))["vision_cfg"]
            return (vision["patch_size"], vision["width"], vision["layers"]) == (32, 768, 12)
        except (FileNotFoundError, KeyError, TypeError, ValueError):
            return False

    def _source(self, context: Context) -> str | Path:
        """The name of a model that open_clip knows, or the folder that `model` means."""
        name = self.model.replace("/", "-")
        if not self.model.startswith(LOCAL) and _named_config(name) is not None:
            return name
        folder = context.find(self.model.removeprefix(LOCAL))
        if not (folder / "open_clip_config.json").is_file():
            raise ValueError(
                f"clip_score: model {self.model!r} is {folder}, which has no open_clip_config.json; "
                "give a folder in open_clip's local format or a name that open_clip knows, such as ViT-L-14"
            )
        return folder

    def _checkpoint(self, context: Context) -> Path:
        """The weights file of a named model: `pretrained` as a file, or downloaded by its tag (cached by open_clip)."""
        import open_clip
        from open_clip.pretrained import download_pretrained, get_pretrained_cfg

        name = self.model.replace("/", "-")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if self.pretrained in tags:
            try:
                return Path(download_pretrained(get_pretrained_cfg(name, self.pretrained))).resolve()
            except Exception as problem:  # whatever the hub's client raises, the repair is the same
                raise ValueError(
                    f"clip_score: weights {self.pretrained!r} of {name} could not be fetched "
                    f"({type(problem).__name__}); set `pretrained` to a weights file on this machine"
                ) from problem
        if self.pretrained:
            try:
                return context.find(self.pretrained)
            except FileNotFoundError as problem:
                raise ValueError(
                    f"clip_score: pretrained {self.pretrained!r} is neither a file ({problem}) nor a tag of {name}; "
                    f"its tags are {', '.join(tags)}"
                ) from None
        raise ValueError(
            f"clip_score: model {name} has no weights without `pretrained`; give a weights file or one of its tags: "
            f"{', '.join(tags)}"
        )


def _named_config(name: str) -> Path | None:
    """open_clip's own configuration file of a model, found without importing open_clip and torch: plans need it too."""
    spec = importlib.util.find_spec("open_clip")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not re.fullmatch(r"[\w.-]+", name):
        return None
    files = [Path(folder) / "model_configs" / f"{name}.json" for folder in folders]
    return next((file for file in files if file.is_file()), None)


def _model_config(source: str | Path) -> dict[str, Any]:
    file = source / "open_clip_config.json" if isinstance(source, Path) else _named_config(source)
    assert file is not None
    config = json.loads(file.read_text())
    return config.get("model_cfg", config)


def fast_pixels(pixels_YXC: np.ndarray, side: int, squash: bool = False) -> np.ndarray:
    """(side, side, 3) uint8: the middle square (squash: all) of a reduced picture, resized bilinearly.

    A picture smaller than `side` is enlarged bicubically, as open_clip does it.
    """
    cv2 = opencv()
    height, width = pixels_YXC.shape[:2]
    short = min(height, width)
    if not squash:
        top, left = (height - short) // 2, (width - short) // 2
        pixels_YXC = pixels_YXC[top : top + short, left : left + short]
    # At most halved here, so that two taps an axis see every pixel.
    return cv2.resize(pixels_YXC, (side, side), interpolation=cv2.INTER_CUBIC if short < side else cv2.INTER_LINEAR)


@dataclass
class _Prepared:
    """One row as the towers take it: pixels as preprocessing gave them and their tokens, or why there are none."""

    pixels: Any = None
    tokens: Any = None
    error: str | None = None


class _Scorer(PreparedMeasure):
    """An open CLIP: a function from a batch to its columns."""

    def __init__(self, stage: ClipScore, context: Context) -> None:
        import open_clip
        import torch
        from open_clip.transform import PreprocessCfg, image_transform_v2

        source = stage._source(context)
        local = isinstance(source, Path)
        name = f"{LOCAL}{source}" if local else str(source)
        kwargs: dict[str, Any] = {}
        if not local:
            # A tag brings its own mean, deviation and activation; a bare file has open_clip's defaults.
            kwargs["pretrained"] = str(stage._checkpoint(context))
            kwargs.update(_tag_settings(name, stage.pretrained))
        self.torch = torch
        self.stage = stage
        self.device = torch.device(context.device)
        self.threads = max(1, int(stage.resources.cpus))
        self.dtype = torch.bfloat16 if stage.precision == "bf16" else torch.float32
        kwargs["require_pretrained"] = True  # a randomly initialised model scores without complaint
        self.model = open_clip.create_model(name, precision=stage.precision, device=self.device, **kwargs).eval()
        settings = PreprocessCfg(**self.model.visual.preprocess_cfg)
        self.preprocess = image_transform_v2(settings, is_train=False)
        self.fast = stage.preprocessing == "fast"
        self.squash = settings.resize_mode == "squash"
        sides = {settings.size} if isinstance(settings.size, int) else set(settings.size)
        self.side = max(sides)
        if self.fast and (len(sides) > 1 or settings.resize_mode == "longest"):
            raise ValueError(
                f"clip_score: {stage.model} takes pictures of {settings.size} resized by {settings.resize_mode!r}, "
                "for which there is no fast preprocessing; write preprocessing: exact"
            )
        self.mean_C11 = torch.tensor(settings.mean, device=self.device)[:, None, None]
        self.std_C11 = torch.tensor(settings.std, device=self.device)[:, None, None]
        self.tokenizer = open_clip.get_tokenizer(name)

    def prepare(self, batch: Batch, row: int) -> _Prepared:
        text = batch["caption"][row]
        try:
            pixels = self._pixels(batch, row)
            if pixels is None:
                return _Prepared(error=batch.image_error(row) or "no picture")
            if not (text or "").strip():
                return _Prepared(error="no caption")
            return _Prepared(pixels, self.tokenizer([text])[0])
        except Exception as problem:  # one odd picture or text must not take the batch with it
            return _Prepared(error=f"clip preprocessing: {type(problem).__name__}: {problem}"[:200])

    def _pixels(self, batch: Batch, row: int) -> Any:
        """What the image tower takes of a row: (3, side, side) floats, or (side, side, 3) bytes where fast; or None."""
        if self.fast:
            # A side that other measures ask for too, where it is enough: one decode serves them all.
            pixels_YXC = batch.reduced(row, max(self.side, REDUCED_SIDE))
            return None if pixels_YXC is None else fast_pixels(pixels_YXC, self.side, self.squash)
        picture = batch.image(row)
        return None if picture is None else self.preprocess(upright_rgb(picture))

    def compute(self, prepared: Sequence[_Prepared]) -> Columns:
        columns = Columns({"score": [], "text_tokens": [], "image_embedding": []}, [])
        threads = self.torch.get_num_threads()
        if self.device.type == "cpu":
            # Last bits depend on how many threads share a sum, so a worker has as many as its description says.
            self.torch.set_num_threads(self.threads)
        try:
            for start in range(0, len(prepared), self.stage.compute_batch):
                self._score(prepared[start : start + self.stage.compute_batch], columns)
        finally:
            self.torch.set_num_threads(threads)
        return columns

    def _score(self, rows: Sequence[_Prepared], columns: Any) -> None:
        """Add the answers for at most `compute_batch` rows, by one pass of either tower."""
        torch = self.torch
        present = [place for place, row in enumerate(rows) if row.error is None]
        errors = [row.error for row in rows]
        scores: list[Any] = [None] * len(rows)
        counts: list[Any] = [None] * len(rows)
        embeddings: list[Any] = [None] * len(rows)
        if present:
            shape = (self.stage.compute_batch,)
            first = rows[present[0]]
            pixels = torch.zeros(shape + first.pixels.shape, dtype=torch.uint8 if self.fast else torch.float32)
            tokens_BL = torch.zeros(shape + first.tokens.shape, dtype=first.tokens.dtype)
            for place in present:
                pixels[place] = torch.as_tensor(rows[place].pixels)
                tokens_BL[place] = rows[place].tokens
            cosine_B, halves_BD = self._towers(pixels, tokens_BL)
            for place in present:
                if not np.isfinite(cosine_B[place]):
                    errors[place] = "score is not a finite number"
                    continue
                scores[place] = float(cosine_B[place])
                counts[place] = self._token_count(tokens_BL[place])
                embeddings[place] = halves_BD[place]
        columns.values["score"] += scores
        columns.values["text_tokens"] += counts
        columns.values["image_embedding"] += embeddings
        columns.errors += errors

    def _towers(self, pixels: torch.Tensor, tokens_BL: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """((B,) cosines, (B, D) half-precision image embeddings of unit length) of one whole batch."""
        torch = self.torch
        with torch.inference_mode():
            pixels = pixels.to(self.device)
            if self.fast:
                pixels = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean_C11) / self.std_C11
            image_BD = self.model.encode_image(pixels.to(self.dtype).contiguous()).float()
            text_BD = self.model.encode_text(tokens_BL.to(self.device)).float()
            image_BD = torch.nn.functional.normalize(image_BD, dim=-1)
            text_BD = torch.nn.functional.normalize(text_BD, dim=-1)
            cosine_B = (image_BD * text_BD).sum(dim=-1)
        return cosine_B.cpu().numpy(), image_BD.cpu().numpy().astype(np.float16)

    @property
    def context_tokens(self) -> int:
        """Most tokens that the text tower reads at once, start and end marks included."""
        return int(self.tokenizer([""]).shape[1])

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, marks included, however many; texts beyond 100 times the context count as that."""
        return self._token_count(self.tokenizer([text], context_length=100 * self.context_tokens)[0])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D) float32 text embeddings of unit length, by passes of `compute_batch`, the last one padded."""
        torch = self.torch
        found: list[np.ndarray] = []
        for start in range(0, len(texts), self.stage.compute_batch):
            part = self.tokenizer(list(texts[start : start + self.stage.compute_batch]))
            tokens_BL = torch.zeros((self.stage.compute_batch, part.shape[1]), dtype=part.dtype)
            tokens_BL[: len(part)] = part
            with torch.inference_mode():
                text_BD = self.model.encode_text(tokens_BL.to(self.device)).float()
                text_BD = torch.nn.functional.normalize(text_BD, dim=-1)
            found.append(text_BD[: len(part)].cpu().numpy())
        return np.concatenate(found) if found else np.zeros((0, 0), np.float32)

    def _token_count(self, tokens: torch.Tensor) -> int:
        """Tokens up to and including the end mark."""
        inner = getattr(self.tokenizer, "tokenizer", None)
        if inner is not None:
            return int((tokens != inner.pad_token_id).sum())
        # open_clip's own tokenizer ends with its highest id and pads with 0, which is also "!".
        return int(tokens.argmax()) + 1


def _tag_settings(name: str, tag: str) -> dict[str, Any]:
    """What a tag of open_clip says beside its weights: preprocessing and activation."""
    from open_clip.pretrained import get_pretrained_cfg

    settings = get_pretrained_cfg(name, tag) if tag else {}
    if not settings:
        return {}
    keys = ("mean", "std", "interpolation", "resize_mode")
    return {
        "force_preprocess_cfg": {key: settings[key] for key in keys if settings.get(key) is not None},
        **({"force_quick_gelu": True} if settings.get("quick_gelu") else {}),
    }
