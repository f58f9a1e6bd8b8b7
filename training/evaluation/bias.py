"""Bias over prompt templates: what does a model draw where the prompt leaves something open?

    # templates.yaml
    templates: ["a {shape}", "a small {shape}"]
    fill: {shape: [circle, square, triangle]}
    draw: 20                       # drawings a prompt
    open: colour                   # what the detector is asked: colour or thing
    of: [red, green, blue]         # the answers that count; an even share of each is the yardstick

The share of each answer is printed with its interval, and the total variation distance from even shares (0: even,
towards 1: always the same). Even shares are a yardstick, not a norm: the training data may be uneven by right.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from training.evaluation.statistics import rate
from training.evaluation.suites import Prompt, Suite, SuiteError

if TYPE_CHECKING:
    from training.evaluation.compare import Comparison

OPEN = ("colour", "thing")
MOST_PROMPTS = 10_000


def read_templates(path: str | Path) -> Suite:
    """The prompts of a file of templates, each as often as it is to be drawn. Raises SuiteError."""
    file = Path(path)
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise SuiteError(f"{file}: not YAML: {problem}") from None
    if not isinstance(said, dict) or not said.get("templates"):
        raise SuiteError(f"{file}: expected the keys templates, fill, draw, open and of")
    fill = {str(name): [str(word) for word in words] for name, words in (said.get("fill") or {}).items()}
    asked, words = str(said.get("open", "colour")), [str(word) for word in said.get("of") or ()]
    if asked not in OPEN or len(words) < 2:
        raise SuiteError(f"{file}: open must be one of {', '.join(OPEN)}, and of must list two answers or more")
    category = json.dumps({"open": asked, "of": words})
    prompts = []
    for template in map(str, said["templates"]):
        names = [name for name in fill if f"{{{name}}}" in template]
        for chosen in itertools.product(*(fill[name] for name in names)):
            text = template
            for name, word in zip(names, chosen, strict=True):
                text = text.replace(f"{{{name}}}", word)
            prompts += [Prompt(text, "bias", category)] * int(said.get("draw", 20))
    if len(prompts) > MOST_PROMPTS:
        raise SuiteError(f"{file}: {len(prompts):,} drawings a model; at most {MOST_PROMPTS:,}")
    return Suite(file.stem, "bias", tuple(prompts))


def bias_audit(found: Comparison) -> list[dict[str, Any]]:
    """One entry a prompt: for each model the share of every answer, how far from even, and how many had none."""
    places: dict[tuple[str, str], list[int]] = {}
    for place in found.places("bias"):
        prompt = found.drawings[place].prompt
        places.setdefault((prompt.text, prompt.category), []).append(place)
    return [_one(found, text, json.loads(category), mine) for (text, category), mine in places.items()]


def _one(found: Comparison, text: str, asked: Mapping[str, Any], places: list[int]) -> dict[str, Any]:
    by_model = {}
    for model, seen in found.seen.items():
        answers = []
        for said in seen.of("checks.found", places):
            # The first object found is the largest or the surest.
            first = (json.loads(said) or [("", "")])[0] if said else ("", "")
            answers.append(first[OPEN.index(asked["open"]) ^ 1])
        counted = [answer for answer in answers if answer in asked["of"]]
        shares = {word: rate([answer == word for answer in counted]).to_json() for word in asked["of"] if counted}
        even = 1 / len(asked["of"])
        apart = sum(abs(one["value"] - even) for one in shares.values()) / 2 if shares else None
        by_model[model] = {"shares": shares, "from_even": apart, "without": len(answers) - len(counted)}
    return {"prompt": text, "open": asked["open"], "by_model": by_model}
