"""Text quality: counts, and the first flaw that makes a caption useless, by name.

    stages:
      text: {type: text_quality}          # text.characters, text.words, text.flaw

`flaw` is null for a caption that says something about a picture, else the first of `FLAWS` that it has: one reason a
caption. A blemish inside a sentence (an address, a credit, "royalty-free stock photo" after a description) is no flaw
while three words are left without it. Rules judge (`{column: text.flaw, is_null: true}`,
`{column: text.words, at_least: 3}`); this file measures. Where a flaw is none to you: `allow: [all caps]`.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from stages.contract import Batch, Column, Columns, Context, Measure, Stage

# Words that a caption must have left once addresses and stock phrases are taken out of it.
WORDS_LEFT = 3
# Only so much of a caption is searched for flaws: some patterns take time that grows with the square of the length.
LONGEST_SEARCHED = 4000

# Control characters, replacement marks, lone surrogates, and marks that turn the direction of what follows them.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_TEMPLATE = re.compile(
    r"\{\{.*?\}\}|\$\{\w+\}|<%.*?%>|%(?:name|title|alt|s)(?:\W|$)|\[object object\]|"
    r"^\W*(?:undefined|null|none|nan|n/a)\W*$",
    re.IGNORECASE,
)
_EXTENSION = r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif|psd)"
_FILE_NAME = re.compile(
    rf"{_EXTENSION}$|^(?:img|dsc[nf]?|image|photo|pic|p|screenshot)[-_ ]?\d{{2,}}$|^\S*{_EXTENSION}\b\S*$",
    re.IGNORECASE,
)
# Words joined by hyphens or underscores where a sentence has spaces, as in addresses of pages and names of uploads.
_SLUG = re.compile(r"^(?=\S*[a-z])(?:[^\W_]+_)+[^\W_]+$|^(?:[^\W_]+[-_]){2,}[^\W_]+$")
_UNDERSCORED = re.compile(r"[^\W_]_[^\W_]")
_URL = re.compile(r"(?:https?://|www\.)\S+|^\S+\.(?:com|org|net|jp|co|ru|de|info)(?:/\S*)?$", re.IGNORECASE)
_HTML = re.compile(r"</?[a-z][^<>]*>|&(?:[a-z]{2,8}|#\d{1,6}|#x[\da-f]{1,6});", re.IGNORECASE)
_STOCK = re.compile(
    r"\b(?:royalty[- ]free(?: stock)?|stock)[- ](?:photo(?:graphy|s)?|image(?:s|ry)?|pictures?|vectors?|illustrations?|"
    r"footage|foto(?:grafie)?)\b|\ball rights reserved\b|\bclick (?:here )?to (?:enlarge|zoom|view)\b|\blorem ipsum\b|"
    r"\b(?:photo|image|picture|photograph)s? (?:credit|courtesy|source)\b|\b(?:vector|stock) image\b",
    re.IGNORECASE,
)
_BOILERPLATE = re.compile(
    r"^\W*(?:(?:photo|image|picture)s?(?: of .{0,3})?|untitled|no (?:caption|description|title)(?: available)?|"
    r"(?:image|picture|photo) may contain.*|click (?:here )?(?:to|for) .*|"
    r"(?:photo|image|picture) (?:\d+|unavailable|not available|coming soon)|thumbnail(?: image)?|logo|banner|"
    r"placeholder|(?:product|gallery|featured|main|default|preview|cover) (?:image|photo|picture)|"
    r"no image(?: available)?|image is loading.*|address not provided.*|"
    r"welcome to [\w'’.-]+|.*- google search|profile (?:picture|photo|image)\b.*|"
    r"(?:photo|image|picture|photograph)s? (?:credit|courtesy|source)\W.*)\W*$",
    re.IGNORECASE,
)
_ADVERT = re.compile(
    r"\b(?:free (?:[\w.]+ )?shipping|buy (?:it )?now|buy\b.*\bonline|add to (?:cart|basket|bag)|limited time|"
    r"save (?:up to )?[$€£]?\d+|for only [$€£]\d+|immediate download|download (?:this|now|free|wallpaper)|"
    r"subscribe (?:to|now)|call (?:us )?(?:now|today)|like us on|click here)\b|\bon facebook\W*$|\d ?% off\b",
    re.IGNORECASE,
)
_EXPLICIT = re.compile(
    r"\b(?:porn(?:o|stars?|hub)?|xxx|blow ?jobs?|hand ?jobs?|cum ?shots?|gang ?bang|creampie|cuckold|milfs?|hentai|"
    r"bukkake|nigg(?:a|er)s?|deep ?throat|fuck(?:ing|ed|s)?|big (?:tits|boobs|cock|ass)|sex (?:video|tape|movie))\b",
    re.IGNORECASE,
)
_RUN = re.compile(r"([^\W\d_])\1{4,}|([^\w\s])\2{9,}")
_HASHTAG = re.compile(r"(?:^|\s)#[^\W\d_]\w*")
_LIST_MARK = re.compile(r"[,;|+•]")
# A token that no one reads aloud: ten or more letters and digits in which they take turns, or a long hexadecimal one.
_MACHINE_TOKEN = re.compile(
    r"^(?=\S*\d)[0-9a-f]{10,}$|^(?:[a-z]+\d+){2,}[a-z\d]{4,}$|^(?:\d+[a-z]+){3,}\d*$", re.IGNORECASE
)
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힯]|[^\W_]+(?:['’][^\W_]+)*")


def words_of(text: str) -> list[str]:
    """Runs of letters or digits; each character of scripts written without spaces counts as a word."""
    return _WORD.findall(text)


def _little_else(pattern: re.Pattern[str], text: str) -> bool:
    """Whether `pattern` is found and too few words are left without it."""
    return pattern.search(text) is not None and len(words_of(pattern.sub(" ", text))) < WORDS_LEFT


def _is_broken_encoding(text: str, words: list[str]) -> bool:
    """UTF-8 read as another encoding ("cafÃ©"), by ftfy's judgement."""
    if text.isascii():
        return False
    from ftfy.badness import is_bad

    return bool(is_bad(text))


def _is_file_name(text: str, words: list[str]) -> bool:
    slug = _SLUG.match(text) if " " not in text else None
    # Two underscored words in one line ("2017_Ford_Edge_SEL_ Roseville") are an upload's name, not a sentence.
    return bool(_FILE_NAME.search(text) or slug or len(_UNDERSCORED.findall(text)) >= 2)


def _is_html(text: str, words: list[str]) -> bool:
    return ("<" in text or "&" in text) and _HTML.search(text) is not None


def _is_mostly_symbols(text: str, words: list[str]) -> bool:
    """Fewer letters than digits and symbols. Spaces count as neither."""
    letters = sum(map(str.isalpha, text))
    return 2 * letters < len(text) - sum(map(str.isspace, text))


def _is_machine_text(text: str, words: list[str]) -> bool:
    tokens = text.split()
    return sum(_MACHINE_TOKEN.match(token) is not None for token in tokens) * 2 >= len(tokens)


def _is_keywords(text: str, words: list[str]) -> bool:
    """Tags in a row: three hashtags, or eight pieces of two words at most on average."""
    pieces = len(_LIST_MARK.findall(text)) + 1
    return (pieces >= 8 and len(words) <= 2.2 * pieces) or ("#" in text and len(_HASHTAG.findall(text)) >= 3)


def _is_repetition(text: str, words: list[str]) -> bool:
    """A run of one character; a word that is more than half of all; or pairs of words said again.

    Pairs count by the share of the text that the commonest one covers, as Gopher's filter has it (over a fifth), or by
    the share of pairs that are not the first of their kind (over a quarter); words of four letters or more, of which
    articles and the like are few, by the share of different ones (0.6 or less). Plural endings are cut first.
    """
    if _RUN.search(text):
        return True
    if len(words) < 6:
        return False
    stems = [word.lower().removesuffix("s") for word in words]
    word, count = Counter(stems).most_common(1)[0]
    if count > len(words) / 2 and len(word) > 1:
        return True
    content = [stem for stem in stems if len(stem) > 3]
    if len(content) >= 8 and len(set(content)) <= 0.6 * len(content):
        return True
    # "and the" may come as often as it likes.
    spoken = (pair for pair in itertools.pairwise(stems) if min(map(len, pair)) > 2 and max(map(len, pair)) > 3)
    pairs = Counter(spoken)
    if not pairs:
        return False
    pair, count = pairs.most_common(1)[0]
    if count < 2:
        return False
    covered = count * (len(pair[0]) + len(pair[1]))
    again = sum(pairs.values()) - len(pairs)
    return (count >= 3 and covered > 0.2 * sum(map(len, stems))) or again > 0.25 * (len(stems) - 1)


def _is_all_caps(text: str, words: list[str]) -> bool:
    return len(words) >= 4 and text.isupper() and sum(map(str.isalpha, text)) >= 16


# In this order; the first that a caption has is its flaw.
FLAWS: dict[str, Callable[[str, list[str]], bool]] = {
    "missing": lambda text, words: not text,
    "control characters": lambda text, words: _CONTROL.search(text) is not None,
    "broken encoding": _is_broken_encoding,
    "template": lambda text, words: _TEMPLATE.search(text) is not None,
    "url": lambda text, words: _little_else(_URL, text),
    "file name": _is_file_name,
    "html": _is_html,
    "no letters": lambda text, words: not any(map(str.isalpha, text)),
    "machine text": _is_machine_text,
    "mostly digits or symbols": _is_mostly_symbols,
    "explicit": lambda text, words: _EXPLICIT.search(text) is not None,
    "boilerplate": lambda text, words: _BOILERPLATE.match(text) is not None or _little_else(_STOCK, text),
    "advert": lambda text, words: _ADVERT.search(text) is not None,
    "keywords": _is_keywords,
    "repetition": _is_repetition,
    "all caps": _is_all_caps,
}


def flaw_of(text: str | None, allow: tuple[str, ...] = ()) -> str | None:
    """The first flaw of a caption, those in `allow` passed over; or None."""
    stripped = (text or "").strip()[:LONGEST_SEARCHED]
    words = words_of(stripped)
    return next((name for name, found in FLAWS.items() if name not in allow and found(stripped, words)), None)


@dataclass(frozen=True, kw_only=True)
class TextQuality(Stage):
    """Characters, words and the first flaw of every caption. allow: names of `FLAWS` that are none here."""

    type: ClassVar[str] = "text_quality"
    version: ClassVar[int] = 3  # 3: slugs, templates, adverts, keywords, pairs of words, capitals, encodings
    cpu_ms_per_row: ClassVar[float] = 0.03
    adds: ClassVar[tuple[Column, ...]] = (
        Column("characters", "int32", "characters"),
        Column("words", "int32", "words"),
        Column("flaw", "string"),
    )
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.allow:
            if name not in FLAWS:
                raise ValueError(f"text_quality: allow names {name!r}; flaws are {', '.join(FLAWS)}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("caption",)

    def open(self, context: Context) -> Measure:
        def measure(batch: Batch) -> Columns:
            values: dict[str, list[Any]] = {"characters": [], "words": [], "flaw": []}
            for caption in batch["caption"]:
                text = (caption or "").strip()
                values["characters"].append(len(text))
                values["words"].append(len(words_of(text)))
                values["flaw"].append(flaw_of(text, self.allow))
            return Columns(values)

        return measure
