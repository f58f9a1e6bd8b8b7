"""What a model said, made into a caption: without preamble, wrapping and loops; refusals and wrong languages told.

    clean("Sure! Here is a caption:\\n\\n**A red circle.**").text        # "A red circle."

Every change has a name in `changes`; an answer that is no caption at all has a status and a reason instead. Answers are
recorded as they came, so a better rule here costs no request.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from stages.captioners import ERROR, REFUSED, SUCCESS, TRUNCATED

LONGEST_READ = 20_000  # characters; no caption is as long
_LOOP_TIMES = 3
_LOOP_WORDS = 12  # longest phrase that is looked for in loops inside a sentence

_THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_SPECIAL = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|<(?:image|img|pad|eos|bos|unk)>|\[/?INST\]")
_FENCE = re.compile(r"\A\s*```\w*\n(.*?)\n?```\s*\Z", re.DOTALL)
_MARKS = re.compile(r"\*\*|__|^#{1,6}\s+", re.MULTILINE)
_PREAMBLE = re.compile(
    r"\A\s*(?:(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|great)\b[^\w\n]*)?"
    r"(?:(?:here(?:'|’)?s|here is|here are|below is|this is|the following is)\b[^.:\n]{0,80}"
    r"\b(?:caption|description|prompt|sentence|summary)s?\b[^.:\n]{0,60}[:\n]|"
    r"(?:(?:image|picture|photo|short|long|detailed|alt(?:ernative)?)[ -])*"
    r"(?:caption|description|alt text|answer)\s*:)\s*",
    re.IGNORECASE,
)
_SURE = re.compile(r"\A\s*(?:sure(?: thing)?|certainly|of course|absolutely)[!,.]\s+", re.IGNORECASE)
_LEAD = re.compile(
    r"\A(?:in )?(?:the|this) (?:image|picture|photo|photograph)(?: here)? "
    r"(?:shows|depicts|features|displays|portrays|contains|captures|presents)\s+",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"\s*(?:(?:let me know|feel free|please let me know|i hope this)\b[^\n]*|is there anything else[^\n]*)\Z",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\A\W*(?:(?:i(?:'|’)?m|i am) (?:very |really )?sorry\b|sorry,|i apologi[sz]e\b|as an? (?:ai|language|text)\b|"
    r"unfortunately,? i\b|(?:i|we) (?:can(?:'|’)?t|cannot|can not|won(?:'|’)?t|(?:am|are) (?:not able|unable) to|"
    r"do not have|don(?:'|’)?t have|(?:am|are) not comfortable)\b|"
    r"(?:i(?:'|’)?m) (?:not able|unable) to\b|(?:no|there is no) (?:image|picture|photo)\b[^.]{0,30}"
    r"\b(?:provided|attached|visible|given|uploaded)\b|"
    r"please (?:provide|upload|attach|share) (?:an?|the) (?:image|picture))",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[^.!?。！？]*(?:[.!?。！？]+[\"'”’)]*|\Z)\s*")


@dataclass(frozen=True)
class Cleaned:
    """status, text and reason as the captions table has them; changes names what was taken away."""

    status: str
    text: str
    reason: str = ""
    changes: tuple[str, ...] = ()


def clean(
    text: str,
    status: str = SUCCESS,
    reason: str = "",
    *,
    language: str = "",
    detect: Callable[[str], tuple[str, float]] | None = None,
) -> Cleaned:
    """The caption in an answer that a model gave with `status` (success or truncated).

    language: ISO 639 code that captions must be in, told by `detect` (text -> code, probability); "" for any.
    """
    cleaned, changes = _bare(text[:LONGEST_READ])
    if _REFUSAL.match(cleaned):
        return Cleaned(REFUSED, cleaned, "refusal", changes)
    whole, looped = _without_loop(cleaned)
    if looped:
        status, reason, cleaned = TRUNCATED, "loop", whole
        changes = (*changes, "loop")
    elif status == TRUNCATED:
        cleaned = _whole_sentences(cleaned)
    if not any(map(str.isalnum, cleaned)):
        return Cleaned(ERROR, "", "empty answer", changes)
    if language and detect is not None:
        code, confidence = detect(cleaned)
        # Two or three words belong to no language in particular.
        if code != language and confidence >= 0.5 and len(cleaned.split()) > 3:
            return Cleaned(ERROR, cleaned, f"language {code}, not {language}", changes)
    return Cleaned(status, cleaned, reason, changes)


def _bare(text: str) -> tuple[str, tuple[str, ...]]:
    """The text without what models put around a caption, and the names of what was there."""
    changes: list[str] = []

    def apply(name: str, changed: str) -> None:
        nonlocal text
        if changed != text:
            changes.append(name)
            text = changed

    apply("thinking", _THINKING.sub("", text))
    apply("special tokens", _SPECIAL.sub("", text))
    text = text.strip()
    apply("fence", _FENCE.sub(r"\1", text))
    apply("markdown", _MARKS.sub("", text))
    apply("preamble", _SURE.sub("", _PREAMBLE.sub("", text, count=1), count=1))
    apply("closing", _CLOSING.sub("", text))
    text = " ".join(text.split())
    for opening, ending in (('"', '"'), ("“", "”"), ("'", "'")):
        inner = text[1:-1]
        if len(text) > 2 and text[0] == opening and text[-1] == ending and opening not in inner:
            apply("quotes", inner.strip())
    led = _LEAD.sub("", text)
    apply("lead", led[:1].upper() + led[1:] if led != text else text)
    return text, tuple(changes)


def _without_loop(text: str) -> tuple[str, bool]:
    """The text up to where it says the same again and again: a sentence or a phrase for the third time."""
    sentences = [match.group() for match in _SENTENCE.finditer(text) if match.group().strip()]
    seen: list[str] = []
    for place, sentence in enumerate(sentences):
        plain = " ".join(re.findall(r"\w+", sentence.lower()))
        if seen.count(plain) >= _LOOP_TIMES - 1 and plain:
            first = [one for one in range(place) if seen[one] == plain][1]
            return "".join(sentences[:first]).strip(), True
        seen.append(plain)
    words = text.split()
    lowered = [word.lower().strip(".,;:!?") for word in words]
    for size in range(1, _LOOP_WORDS + 1):
        times = _LOOP_TIMES if size > 2 else 2 * _LOOP_TIMES  # "very, very, very" is English
        run = 0
        for place in range(size, len(lowered)):
            run = run + 1 if lowered[place] == lowered[place - size] else 0
            if run >= size * (times - 1):
                return " ".join(words[: place - run + 1]).rstrip(",;:"), True
    return text, False


def _whole_sentences(text: str) -> str:
    """The text up to its last full stop; all of it where it has none."""
    end = max(text.rfind(mark) for mark in ".!?。！？")
    return text[: end + 1] if end > 0 else text
