"""What a stage is: a frozen description that opens, on a worker, into a function from a batch to its new columns.

A stage says which columns it needs, which it adds, what a worker of it takes and its version. Opened with a `Context`
it gives a function `Batch -> Columns`. The function returns new columns alone, one value a row, so a stage can
neither lose nor reorder rows; a row it cannot measure gets an error with a reason and takes nothing else with it.

    @dataclass(frozen=True, kw_only=True)
    class WordCount(Stage):
        type = "word_count"
        needs = ("caption",)
        adds = (Column("words", "int32", unit="words"),)

        def open(self, context):
            return lambda batch: Columns({"words": [len((text or "").split()) for text in batch["caption"]]})

Fields of the dataclass are its part of the recipe's schema and belong to the identity of its results. What two runs may
differ in without changing a number (devices, worker counts, paths) is never a field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


@dataclass(frozen=True)
class Column:
    """A column that a stage adds: its name inside the stage, Arrow type and meaning.

    type: an Arrow type as `pyarrow.type_for_alias` spells it, or "fixed_binary[N]", or "halffloat[N]" for a vector
    ("halffloat[]" where its length is the model's).
    unit, scale: for people and for checks ("px", "words"; "cosine -1..1", "about 1..10").
    feature: True for wide columns (embeddings) that live in features/ instead of the ledger.
    captions: True for lists, one item a caption, that become rows of the captions table instead.
    """

    name: str
    type: str
    unit: str = ""
    scale: str = ""
    feature: bool = False
    captions: bool = False


@dataclass(frozen=True)
class Resources:
    """What one worker of a stage takes. memory_bytes is reserved heap memory."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory_bytes: int = 0


@dataclass(frozen=True)
class Context:
    """What a worker knows that a description must not: where the weights lie and which device to use.

    models: folders searched, in order, for weights that a recipe names by a relative path.
    device: "cpu", "cuda" or "cuda:N".
    cache: folder on a disk that every worker reaches, for answers that must never be paid for twice; "" for none.
    """

    models: tuple[str, ...] = ()
    device: str = "cpu"
    cache: str = ""

    def find(self, name: str) -> Path:
        """The file or folder called `name`: as given if absolute, else in the first model folder that has it.

        Raises FileNotFoundError naming every place that was searched.
        """
        candidates = [Path(name)] if Path(name).is_absolute() else [Path(folder) / name for folder in self.models]
        for candidate in candidates:
            if candidate.exists():
                return candidate.resolve()
        searched = ", ".join(str(candidate) for candidate in candidates) or "nowhere: no model folder is set"
        raise FileNotFoundError(f"weights {name!r} were not found (searched {searched}); pass --models FOLDER")


@dataclass
class Columns:
    """A stage's answer for one batch: `values[name][i]` for row i, `errors[i]` where row i could not be measured."""

    values: Mapping[str, Sequence[Any]]
    errors: Sequence[str | None] | None = None


class Batch:
    """Some rows of one shard, in row order: columns by name, and the decoded picture of a row on demand.

    `batch["caption"]` is the column; `batch.image(i)` the decoded picture of row i (decoded at most once a pass,
    shared by every stage of the pass) or None, in which case `batch.image_error(i)` says why.
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]], images: Sequence[LazyImage] = ()) -> None:
        self.columns = dict(columns)
        self.images = images

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, name: str) -> Sequence[Any]:
        return self.columns[name]

    def image(self, row: int) -> Image.Image | None:
        return self.images[row].picture()

    def reduced(self, row: int, side: int) -> np.ndarray | None:
        """(height, width, 3) uint8 RGB of row i, upright, from a reduced-size decode: short side at least `side` px,
        and less than twice that, or as it was where it was smaller. None: `image_error(row)` says why."""
        return self.images[row].reduced(side)

    def header(self, row: int) -> Image.Image | None:
        """The picture of row i as its header describes it (size, mode, format, EXIF); its pixels may be undecoded."""
        return self.images[row].header()

    def image_error(self, row: int) -> str | None:
        return self.images[row].error


class LazyImage:
    """Encoded bytes that decode once, when first looked at. `stages.decode.EncodedImage` is the real one."""

    error: str | None = None

    def picture(self) -> Image.Image | None:
        raise NotImplementedError

    def reduced(self, side: int) -> np.ndarray | None:
        raise NotImplementedError

    def header(self) -> Image.Image | None:
        raise NotImplementedError

    def release(self) -> None:
        """Forget the pixels; they decode again if looked at again."""


Measure = Callable[[Batch], Columns]


class PreparedMeasure:
    """A measure in two halves, so that rows can be made ready in other threads while a model computes.

    `prepare` is called once a row, from several threads at once, and does what needs no model: decode, resize,
    tokenize. It gives whatever `compute` wants of a row, and a reason where there is nothing: it never raises for a bad
    row. `compute` gets a whole batch of these in row order, always in the same thread.
    """

    def prepare(self, batch: Batch, row: int) -> Any:
        raise NotImplementedError

    def compute(self, prepared: Sequence[Any]) -> Columns:
        raise NotImplementedError

    def __call__(self, batch: Batch) -> Columns:
        return self.compute([self.prepare(batch, row) for row in range(len(batch))])


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Base of every measure. Subclasses are frozen dataclasses whose fields are their options in a recipe."""

    # Options that no stage knows are refused where the recipe is read (pydantic honours this on plain dataclasses).
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    type: ClassVar[str]
    version: ClassVar[int] = 1
    adds: ClassVar[tuple[Column, ...]] = ()
    resources: ClassVar[Resources] = Resources()
    # CPU milliseconds a row on one 2026 server core, measured; only for estimates in a plan.
    cpu_ms_per_row: ClassVar[float] = 1.0
    # Options that may hold a path to weights: a path never joins the identity, the weights' digests do.
    path_options: ClassVar[tuple[str, ...]] = ()
    # A model stage cuts each shard's rows, in order, into batches of this many whatever the transport batch, so that
    # floating-point results do not depend on workers or transport. 0: rows are independent, any batch will do.
    compute_batch: int = field(default=0, kw_only=True)
    # Rules that must have passed before a costly stage looks at a row; the others carry not_measured(rule).
    after: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns read: "image", "caption" and other reader columns, or `<stage instance>.<name>`."""
        return ()

    def weights(self, context: Context) -> Mapping[str, Path]:
        """Files whose content decides this stage's numbers, by a short stable name; their digests join its identity."""
        return {}

    def estimate(self, context: Context, rows: int | None) -> str:
        """What at most `rows` rows (None: not known) will cost beside CPU time, in words for a plan; "" if nothing."""
        return ""

    def open(self, context: Context) -> Measure:
        """Load what is needed, on the worker, and return the function that computes `adds`."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Every option as plain JSON values; a path to weights is cut to its last part."""
        values = asdict(self)
        for name in self.path_options:
            if isinstance(values.get(name), str) and ("/" in values[name] or "\\" in values[name]):
                values[name] = Path(values[name]).name
        return values

    def identity(self) -> dict[str, Any]:
        """The options that belong to the identity of a row's numbers (not what decides which rows are measured)."""
        return {name: value for name, value in self.options().items() if name != "after"}


def digest_of(*parts: Any) -> str:
    """32 hex digits of sha256 over the canonical JSON of `parts`: the project's digest for descriptions."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_digest(path: Path | str) -> str:
    """64 hex digits of sha256 over a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_digest(files: Iterable[tuple[str, str]]) -> str:
    """One digest for a set of (short name, file digest)."""
    return digest_of("weights", sorted(files))
