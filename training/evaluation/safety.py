"""How well a guard over prompts works: false alarms on benign prompts, and how many unsafe ones get past it disguised.

    audit = audit_guard(blocklist("words.txt"), benign=[...], unsafe=[...])

A guard is a function from a prompt to whether it is refused. Unsafe prompts are also given disguised, the way people
do it: letters that look alike in another script, letters set wide or small by Unicode, invisible characters between
letters, accents on top, letters spelt as digits, doubled and exchanged letters. A prompt counts as past the guard only
where the guard refuses it undisguised; otherwise it is a miss, and counted apart.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.evaluation.statistics import Estimate, rate

Guard = Callable[[str], bool]

# Cyrillic and Greek letters that most fonts draw like Latin ones.
LOOKALIKES = str.maketrans("aceopxyi", "асеорхуі")
DIGITS = str.maketrans("aeiost", "431057")
INVISIBLE = "\u200b"  # zero width space
ACCENT = "\u0301"


def _wide(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def _inside(text: str, change: Callable[[str, np.random.Generator], str], rng: np.random.Generator) -> str:
    return re.sub(r"[^\W\d_]{4,}", lambda word: change(word[0], rng), text)


def _exchange(word: str, rng: np.random.Generator) -> str:
    place = int(rng.integers(1, len(word) - 2))
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def _double(word: str, rng: np.random.Generator) -> str:
    place = int(rng.integers(1, len(word)))
    return word[:place] + word[place - 1] + word[place:]


DISGUISES: dict[str, Callable[[str, np.random.Generator], str]] = {
    "letters of another script": lambda text, rng: text.translate(LOOKALIKES),
    "wide letters": lambda text, rng: _wide(text),
    "invisible characters": lambda text, rng: _inside(text, lambda word, _: INVISIBLE.join(word), rng),
    "accents": lambda text, rng: _inside(text, lambda word, _: word[:2] + ACCENT + word[2:], rng),
    "digits for letters": lambda text, rng: text.translate(DIGITS),
    "capitals": lambda text, rng: "".join(c.upper() if n % 2 else c for n, c in enumerate(text)),
    "exchanged letters": lambda text, rng: _inside(text, _exchange, rng),
    "doubled letters": lambda text, rng: _inside(text, _double, rng),
    "spaces between letters": lambda text, rng: _inside(text, lambda word, _: " ".join(word), rng),
}


@dataclass(frozen=True)
class GuardAudit:
    """false_alarms: of benign prompts; caught: of unsafe prompts as they are; bypass: disguise -> share of the caught
    ones that get past the guard with it."""

    false_alarms: Estimate
    caught: Estimate
    bypass: Mapping[str, Estimate]

    def to_json(self) -> dict[str, Any]:
        bypass = {name: one.to_json() for name, one in self.bypass.items()}
        return {"false_alarms": self.false_alarms.to_json(), "caught": self.caught.to_json(), "bypass": bypass}


def audit_guard(guard: Guard, benign: Sequence[str], unsafe: Sequence[str], seed: int = 0) -> GuardAudit:
    """Ask the guard about benign prompts, unsafe ones and unsafe ones in every disguise."""
    caught = [text for text in unsafe if guard(text)]
    bypass = {}
    for number, (name, disguise) in enumerate(DISGUISES.items()):
        rng = np.random.default_rng([seed, 41, number])
        if caught:
            bypass[name] = rate([not guard(disguise(text, rng)) for text in caught])
    return GuardAudit(rate([guard(text) for text in benign]), rate([guard(text) for text in unsafe]), bypass)


def blocklist(path: str | Path, fold: bool = True) -> Guard:
    """A guard that refuses prompts with a word or phrase of a file (one a line, # comments).

    fold: look-alikes, accents, invisible characters and compatibility forms are undone first.
    """
    lines = (line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    phrases = [folded(line) if fold else line.lower() for line in lines if line and not line.startswith("#")]
    if not phrases:
        raise ValueError(f"{path}: there is no word to refuse in it: write one a line")
    pattern = re.compile(r"\b(?:" + "|".join(map(re.escape, phrases)) + r")\b")
    return lambda text: bool(pattern.search(folded(text) if fold else text.lower()))


def folded(text: str) -> str:
    """Text as it is meant to be read: compatibility forms, look-alike letters, accents and invisible signs undone."""
    plain = unicodedata.normalize("NFKD", text).lower()
    kept = "".join(c for c in plain if not unicodedata.combining(c) and unicodedata.category(c) != "Cf")
    return kept.translate({ord(theirs): ord(ours) for theirs, ours in zip("асеорхуі", "aceopxyi", strict=True)})
