"""Training recipes: what a run trains, on what, how long; read from YAML and checked to the last key.

    name: tiny
    model: {size: tiny, qk_norm: true}          # a published size and fields of LinearDiTConfig laid over it
    resolution: 32
    autoencoder: {type: pixel_shuffle, factor: 4}
    text_encoder: {path: text_encoder}
    objective: {type: flow_matching, caption_dropout: 0.1}
    optimizer: {lr: 3e-4, warmup_steps: 100}
    batch: {global_batch: 64, micro_batch: 32}
    steps: 1500

A recipe for `sluice distill` leaves out model, resolution, autoencoder and text_encoder: those are the teacher's.

Unknown keys are refused with the nearest known one; values are coerced by the field's type, since YAML reads `3e-4`
as a string. `RESOURCES` names the keys that never change what is learnt, only where and how it is computed; all the
others belong to a run's identity, and a run that is continued must have them as it began.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines.recipe import RecipeError
from stages.contract import digest_of


class Section(BaseModel):
    """Base of every part of a recipe: frozen, and without room for keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerOptions(Section):
    """AdamW with a linear warm-up to a constant rate, as the SANA recipes have it, or one that falls at the end.

    type: "muon" moves the blocks' matrices by orthogonalised momentum (Muon, Jordan et al. 2024) at the rate `muon_lr`,
    all else by AdamW at `lr`; both rates rise and fall together. On the tiny model it needs about half the steps.
    muon_momentum: of the matrices' gradient average.
    decay_steps: the rate falls linearly to zero over this many steps before the end; 0, as SANA has it, keeps it up.
    gradient_clipping: largest global gradient norm; 0 leaves gradients as they are. Always handed to DeepSpeed
    explicitly, whose own default is 1.0.
    """

    type: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=1e-4, gt=0)
    muon_lr: float = Field(default=0.02, gt=0)
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    decay_steps: int = Field(default=0, ge=0)
    gradient_clipping: float = Field(default=0.1, ge=0)

    def lr_at(self, step: int, steps: int) -> float:
        """The rate of optimizer step `step` (from 0) of a run of `steps`."""
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        fall = min(1.0, (steps - step) / self.decay_steps) if self.decay_steps else 1.0
        return self.lr * min(rise, fall)


class BatchOptions(Section):
    """global_batch: samples an optimizer step, whatever the number of workers. micro_batch: samples a worker holds at
    once; what is missing to the global batch is accumulated."""

    global_batch: int = Field(default=64, ge=1)
    micro_batch: int = Field(default=32, ge=1)


class CaptionOptions(Section):
    """Which of a sample's captions an epoch learns from (training.captions has the formulas).

    synthetic_fraction: how often a synthetic caption is taken where a sample has both kinds; none: no difference is
    made. weighting: all alike, or by CLIP score. temperature: of the weighting, on scores of 100·cosine. threshold:
    captions that score lower are left out (SANA: 25). words_first, words_last, words_epochs: no caption of more words
    than a limit that rises from the first to the last over so many epochs, and is gone after them.
    """

    synthetic_fraction: float | None = Field(default=None, ge=0, le=1)
    weighting: Literal["uniform", "softmax", "power"] = "uniform"
    temperature: float = Field(default=0.1, gt=0)
    threshold: float | None = None
    words_first: int | None = Field(default=None, ge=1)
    words_last: int | None = Field(default=None, ge=1)
    words_epochs: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _a_whole_curriculum(self) -> CaptionOptions:
        given = (self.words_first is not None, self.words_last is not None, self.words_epochs > 0)
        if any(given) and not all(given):
            raise ValueError("a length curriculum needs words_first, words_last and words_epochs")
        return self


class FeatureOptions(Section):
    """Stages of the snapshot whose features are read instead of computed (training.features); none: computed."""

    latents: str | None = None
    text: str | None = None


class Recipe(Section):
    """A training or distillation recipe. Lengths are in optimizer steps.

    model: `size` and fields of LinearDiTConfig; in_channels, out_channels, sample_size and caption_channels follow
    from the autoencoder, the resolution and the text encoder unless written down. checkpoint_activations: recompute
    every n-th block in the backward pass; 0 keeps all. autoencoder, text_encoder: options of stages.autoencoders and
    stages.text_encoders. captions: which of a sample's captions is learnt from; without it, the original one.
    features: what the snapshot holds ready: latents, text features. objective: `type` and its options
    (training.objectives). precision: of parameters and activations; masters, EMA and optimizer states are float32
    always. ema_decay: at the end of its ramp (training.ema); 0 publishes the raw weights. zero_stage: DeepSpeed's ZeRO
    stage; 2 holds every SANA size on 80 GB cards. workers: one a GPU, or a few a CPU. cache_bytes: latents and text
    features of the whole snapshot are kept in memory when they fit in this, each worker. keep_checkpoints: the newest
    so many; 0 keeps all. restarts: how often a run starts itself again after a worker died.
    """

    name: str = Field(default="train", pattern=r"^[\w.-]{1,60}$")
    model: dict[str, Any] | None = None
    checkpoint_activations: int = Field(default=0, ge=0)
    resolution: int | None = Field(default=None, ge=8)
    autoencoder: dict[str, Any] | None = None
    text_encoder: dict[str, Any] | None = None
    captions: CaptionOptions | None = None
    features: FeatureOptions = FeatureOptions()
    objective: dict[str, Any] = {"type": "flow_matching"}
    optimizer: OptimizerOptions = OptimizerOptions()
    batch: BatchOptions = BatchOptions()
    steps: int = Field(default=1500, ge=1)
    seed: int = Field(default=0, ge=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    zero_stage: Literal[0, 1, 2, 3] = 2
    workers: int = Field(default=1, ge=1)
    cache_bytes: int = Field(default=2_000_000_000, ge=0)
    checkpoint_every: int = Field(default=500, ge=1)
    keep_checkpoints: int = Field(default=3, ge=0)
    validate_every: int = Field(default=500, ge=1)
    validate_samples: int = Field(default=256, ge=0)
    log_every: int = Field(default=10, ge=1)
    restarts: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, given: Any) -> Any:
        # YAML 1.1 reads 2e9 as a string and pydantic refuses "2e9" for an integer: mean what was written.
        if isinstance(given, dict) and isinstance(given.get("cache_bytes"), str):
            try:
                return {**given, "cache_bytes": int(float(given["cache_bytes"]))}
            except ValueError:
                return given
        return given

    def accumulation(self, workers: int | None = None) -> int:
        """Micro-batches a worker runs for one optimizer step. Raises RecipeError where the batch does not divide."""
        workers = workers or self.workers
        share = self.batch.micro_batch * workers
        if self.batch.global_batch % share:
            fitting = [m for m in range(self.batch.micro_batch, 0, -1) if self.batch.global_batch % (m * workers) == 0]
            repair = f"micro_batch {fitting[0]} would do" if fitting else f"make global_batch a multiple of {workers}"
            raise RecipeError(
                f"batch: global_batch {self.batch.global_batch} cannot be cut into micro-batches of "
                f"{self.batch.micro_batch} on {workers} workers ({share} at a time): {repair}"
            )
        return self.batch.global_batch // share

    def plain(self) -> dict[str, Any]:
        """The resolved recipe as JSON values, every default written out."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, Any]:
        """`plain()` without resources: what a continued run must not change."""
        return {key: value for key, value in self.plain().items() if key not in self.resources()}

    def resources(self) -> frozenset[str]:
        """Keys that may change when a run is continued. Where the rate falls towards the end, the end may not."""
        return RESOURCES - {"steps"} if self.optimizer.decay_steps else RESOURCES

    def digest(self) -> str:
        return digest_of("training recipe", self.identity())


# Where and how a run is computed and watched, and how long it goes on: free to change when it is continued.
RESOURCES = frozenset(
    {
        "name",
        "steps",
        "workers",
        "zero_stage",
        "cache_bytes",
        "checkpoint_every",
        "keep_checkpoints",
        "validate_every",
        "validate_samples",
        "log_every",
        "restarts",
        "checkpoint_activations",
        "features",
    }
)


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from a YAML file or a mapping, with `optimizer.lr=3e-4` overrides laid over it.

    Raises RecipeError for unknown keys and wrong values, FileNotFoundError for a missing file.
    """
    raw = _read_yaml(Path(source)) if isinstance(source, str | Path) else dict(source)
    for override in overrides:
        raw = override_at(raw, override)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as problem:
        raise RecipeError(_sentence(problem)) from None
    recipe.accumulation()
    return recipe


def override_at(raw: Mapping[str, Any], override: str) -> dict[str, Any]:
    """A copy of `raw` with one `dotted.path=value` set; the value is read as YAML."""
    path, equals, text = override.partition("=")
    parts = [part.strip() for part in path.split(".")]
    if not equals or not all(parts):
        raise RecipeError(f"--set {override!r} is not of the form optimizer.lr=3e-4")
    result = dict(raw)
    here = result
    for depth, part in enumerate(parts[:-1]):
        inner = here.get(part)
        if inner is not None and not isinstance(inner, Mapping):
            where = ".".join(parts[: depth + 1])
            raise RecipeError(f"--set {path}: {where} is {inner!r}, not a table with keys of its own")
        here[part] = dict(inner or {})
        here = here[part]
    here[parts[-1]] = yaml.safe_load(text)
    return result


def numeric(value: Any) -> Any:
    """`value` with strings that are numbers made numbers: for tables whose fields no schema here knows."""
    if isinstance(value, dict):
        return {key: numeric(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [numeric(inner) for inner in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def changes_to(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted path, old, new) for every value that differs between two resolved recipes."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += changes_to(before, after, f"{where}{key}.")
        elif before != after:
            found.append((f"{where}{key}", before, after))
    return found


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise RecipeError(f"{path} is not YAML: {problem}") from None
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path} holds {type(raw).__name__}, not the keys of a training recipe (model, batch, steps, ...)"
        )
    return raw


def _sentence(problem: ValidationError) -> str:
    first = problem.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "the recipe"
    if first["type"] == "extra_forbidden":
        section: type[BaseModel] = Recipe
        for part in first["loc"][:-1]:
            annotation = section.model_fields[str(part)].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                section = annotation
        known = list(section.model_fields)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        return f"{place} is not an option; " + (
            f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        )
    what = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] == "missing" else f" (it is {first['input']!r})"
    return f"{place}: {what[0].lower() + what[1:]}{given}"
