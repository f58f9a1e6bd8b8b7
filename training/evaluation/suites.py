"""Prompt suites: files of GenEval, PartiPrompts, T2I-CompBench and of users, as one list of prompts.

    suite = read_suite("evaluation_metadata.jsonl")       # recognised by what is in it
    suite.prompts[0]       # Prompt(text="a photo of a bench", category="single_object", asked=(Asked("bench"),))

A prompt may say what has to be in its picture (`asked`), what must not (`forbidden`), and questions with their answers.
A user's file holds a prompt a line, or JSON lines with `prompt`, and if wanted `category`, `include`, `exclude`
(GenEval's keys) and `questions` ({"question", "answer", "choices"}). Files are other people's: they are read as text,
checked field by field, and a line that does not fit is named.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.contract import digest_of

RELATIONS = ("left of", "right of", "above", "below")
LONGEST_PROMPT = 4000  # characters; a longer line is no prompt
COMPBENCH = ("color", "shape", "texture", "spatial", "3d_spatial", "non_spatial", "numeracy", "complex")


class SuiteError(ValueError):
    """A prompt file that cannot be read; the message names the line and what to write."""


@dataclass(frozen=True)
class Asked:
    """Objects that a picture shall hold: at least `count` of `thing`, in `colour`, standing as `relation` says to the
    first object of the `to`-th entry. An empty thing or colour stands for any. As `forbidden`: `count` or more of it.
    """

    thing: str = ""
    count: int = 1
    colour: str = ""
    relation: str = ""
    to: int = 0


@dataclass(frozen=True)
class Question:
    """A question about a picture with the answer that is right if the picture shows the prompt."""

    text: str
    answer: str
    choices: tuple[str, ...] = ("yes", "no")


@dataclass(frozen=True)
class Prompt:
    """One prompt, where it comes from, and what can be checked of its pictures."""

    text: str
    suite: str
    category: str = ""
    asked: tuple[Asked, ...] = ()
    forbidden: tuple[Asked, ...] = ()
    questions: tuple[Question, ...] = ()

    @property
    def checkable(self) -> bool:
        return bool(self.asked or self.forbidden)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Prompt:
        return cls(
            said["text"],
            said["suite"],
            said["category"],
            tuple(Asked(**one) for one in said["asked"]),
            tuple(Asked(**one) for one in said["forbidden"]),
            tuple(Question(one["text"], one["answer"], tuple(one["choices"])) for one in said["questions"]),
        )


@dataclass(frozen=True)
class Suite:
    """Prompts with a name. kind: geneval, parti, t2i_compbench, user, made_up, captions."""

    name: str
    kind: str
    prompts: tuple[Prompt, ...]

    @property
    def digest(self) -> str:
        return digest_of("suite", [prompt.to_json() for prompt in self.prompts])

    def first(self, limit: int) -> Suite:
        """At most `limit` prompts, the categories kept in proportion (0: all)."""
        if not limit or limit >= len(self.prompts):
            return self
        places: dict[str, list[int]] = {}
        for place, prompt in enumerate(self.prompts):
            places.setdefault(prompt.category, []).append(place)
        # Each category's n-th prompt stands at (n + 1/2) / its size: taking the smallest first keeps proportions.
        ranked = sorted(((n + 0.5) / len(mine), place) for mine in places.values() for n, place in enumerate(mine))
        chosen = sorted(place for _, place in ranked[:limit])
        return Suite(self.name, self.kind, tuple(self.prompts[place] for place in chosen))


def read_suite(path: str | Path) -> Suite:
    """The suite in a file. Raises SuiteError for a file that is none, FileNotFoundError where there is no file."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise SuiteError(f"{file}: not a text file in UTF-8: give prompts, one a line") from None
    lines = text.splitlines()
    if file.suffix in (".jsonl", ".json") or text.lstrip().startswith("{"):
        kind = "geneval" if '"tag"' in text else "user"
        prompts = [_from_json(file, number, line, kind) for number, line in _numbered(lines)]
    elif lines and lines[0].split("\t")[:2] == ["Prompt", "Category"]:
        kind = "parti"
        rows = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
        prompts = [Prompt(_text(file, n, row["Prompt"]), file.stem, row["Category"]) for n, row in enumerate(rows, 2)]
    else:
        stem = file.stem.removesuffix("_val").removesuffix("_train").lower()
        kind = "t2i_compbench" if stem in COMPBENCH else "user"
        category = stem if kind == "t2i_compbench" else ""
        prompts = [Prompt(_text(file, n, line), file.stem, category) for n, line in _numbered(lines) if line[0] != "#"]
    if not prompts:
        raise SuiteError(f"{file}: there is no prompt in it: write one a line")
    return Suite(file.stem, kind, tuple(prompts))


def _numbered(lines: Iterable[str]) -> Iterable[tuple[int, str]]:
    return ((number, line.strip()) for number, line in enumerate(lines, 1) if line.strip())


def _text(file: Path, number: int, text: Any) -> str:
    if not isinstance(text, str) or not text.strip() or len(text) > LONGEST_PROMPT:
        raise SuiteError(f"{file}, line {number}: expected a prompt of 1 to {LONGEST_PROMPT:,} characters")
    return text.strip()


def _from_json(file: Path, number: int, line: str, kind: str) -> Prompt:
    try:
        said = json.loads(line)
        if not isinstance(said, dict):
            raise TypeError("expected an object")
        include = tuple(_asked(one) for one in said.get("include", ()))
        exclude = tuple(_asked(one) for one in said.get("exclude", ()))
        questions = tuple(
            Question(str(one["question"]), str(one["answer"]), tuple(map(str, one.get("choices", ("yes", "no")))))
            for one in said.get("questions", ())
        )
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as problem:
        raise SuiteError(f"{file}, line {number}: not a prompt in JSON ({problem})") from None
    for one in include:
        if one.relation and not 0 <= one.to < len(include):
            raise SuiteError(f"{file}, line {number}: position refers to entry {one.to} of {len(include)}")
    category = str(said.get("tag") or said.get("category") or "")
    text = _text(file, number, said.get("prompt"))
    return Prompt(text, "geneval" if kind == "geneval" else file.stem, category, include, exclude, questions)


def _asked(one: Mapping[str, Any]) -> Asked:
    relation, to = one.get("position", ("", 0))
    if relation and relation not in RELATIONS:
        raise ValueError(f"position {relation!r} is none of {', '.join(RELATIONS)}")
    count = int(one.get("count", 1))
    if count < 1:
        raise ValueError(f"count {count} must be at least 1")
    return Asked(str(one.get("class", "")), count, str(one.get("color", "")), str(relation), int(to))


def categories(prompts: Sequence[Prompt]) -> list[str]:
    """Categories in order of appearance, "suite: category" where there are several suites."""
    several = len({prompt.suite for prompt in prompts}) > 1
    return list(dict.fromkeys(category_of(prompt, several) for prompt in prompts))


def category_of(prompt: Prompt, several_suites: bool) -> str:
    name = prompt.category or "all"
    return f"{prompt.suite}: {name}" if several_suites else name
