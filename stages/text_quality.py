"""Text quality: counts, and the first flaw that makes a caption useless, by name.

    stages:
      text: {type: text_quality}          # text.characters, text.words, text.flaw

`flaw` is null for a caption that says something, else one of: missing, url, file name, html, no letters, boilerplate,
repetition. Rules judge (`{column: text.flaw, is_null: true}`, `{column: text.words, at_least: 3}`); this file measures.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from stages.contract import Batch, Column, Columns, Context, Measure, Stage

_FILE_NAME = re.compile(
    r"^\S*\.(jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif)$|^(img|dsc[nf]?|image|photo|pic|p)[-_ ]?\d{2,}$", re.IGNORECASE
)
_URL = re.compile(r"(https?://|www\.)\S+|^\S+\.(com|org|net)(/\S*)?$", re.IGNORECASE)
_HTML = re.compile(r"</?[a-z][^<>]*>|&(nbsp|amp|lt|gt|quot|#\d+);", re.IGNORECASE)
_BOILERPLATE = re.compile(
    r"^(stock (photo|image|picture|vector|illustration)s?|"
    r"(royalty[- ]free )?(stock )?(photo|image|picture)s?( of .{0,3})?|"
    r"untitled|no (caption|description|title)( available)?|image may contain.*|click (here )?(to|for) .*|"
    r"(photo|image|picture) (\d+|unavailable|not available|coming soon)|thumbnail( image)?|logo|banner|placeholder|"
    r"(photo|image|picture|photograph)s? (credit|courtesy|source)\W.*|"
    r"(product|gallery|featured|main|default|preview) (image|photo|picture)|no image( available)?)\W*$"
    r"|(^|\W)(royalty[- ]free (stock )?(photo|image|illustration)|all rights reserved|click to (enlarge|zoom|view)|"
    r"download (this|now|free|wallpaper)|buy (it )?now|add to (cart|basket)|free shipping|lorem ipsum|"
    r"subscribe to)(\W|$)",
    re.IGNORECASE,
)


def words_of(text: str) -> list[str]:
    """Runs of letters or digits; each character of scripts written without spaces counts as a word."""
    return re.findall(r"[぀-ヿ㐀-鿿가-힯]|[^\W_]+(?:['’][^\W_]+)*", text)


def flaw_of(text: str | None) -> str | None:
    """The first flaw of a caption, or None."""
    stripped = (text or "").strip()
    if not stripped:
        return "missing"
    words = [word.lower() for word in words_of(stripped)]
    # A URL inside a real sentence is a blemish; a caption that is little else is a flaw.
    if _URL.search(stripped) and len(words_of(_URL.sub(" ", stripped))) < 3:
        return "url"
    if _FILE_NAME.search(stripped):
        return "file name"
    if _HTML.search(stripped):
        return "html"
    if not any(character.isalpha() for character in stripped):
        return "no letters"
    if _BOILERPLATE.search(stripped):
        return "boilerplate"
    if len(words) >= 6 and Counter(words).most_common(1)[0][1] > len(words) / 2:
        return "repetition"
    return None


@dataclass(frozen=True, kw_only=True)
class TextQuality(Stage):
    """Characters, words and the first flaw of every caption."""

    type: ClassVar[str] = "text_quality"
    version: ClassVar[int] = 2  # 2: picture credits are boilerplate; an address is a url before it is a file name
    adds: ClassVar[tuple[Column, ...]] = (
        Column("characters", "int32", "characters"),
        Column("words", "int32", "words"),
        Column("flaw", "string"),
    )

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
                values["flaw"].append(flaw_of(text))
            return Columns(values)

        return measure
