"""Lists of what must not be kept: takedowns, opt-outs and known-bad pictures, by the rules `opt_out` and `known_bad`.

    rules:
      known_bad: {type: known_bad, file: known_bad.txt, phash: hash.phash, radius: 4}
      opt_out:   {type: opt_out, file: takedown.txt, tags: robots, licences: [cc0, cc-by], domains: [example.com]}

A file holds one entry a line, and an entry says by its form what it is: 64 hexadecimal digits a sha256 of image bytes,
32 an image_id, 16 a pHash, something with "://" a URL, anything else a domain (its subdomains are meant too). Lines
that are empty or begin with # are skipped.

Both rules guard: they stand first in a recipe, no costly stage looks at a row they drop (so nothing of it is captioned,
embedded or cached), and no report shows it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np

from stages.contract import file_digest
from stages.rules import Rule, Table, Verdicts

NO_AI_TAGS = ("noai", "noimageai", "noindex", "noimageindex")
_HEX = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True)
class Entries:
    """A list read: digests and ids in lower-case hex, pHashes (N,) uint64, URLs as written, domains in lower case."""

    sha256: frozenset[str]
    image_ids: frozenset[str]
    phashes: np.ndarray
    urls: frozenset[str]
    domains: frozenset[str]


@functools.lru_cache(maxsize=8)
def read_entries(path: str, digest: str) -> Entries:
    """The entries of a list file whose sha256 is `digest`. Raises ValueError where it has changed since."""
    data = Path(path).read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{path} has changed since the recipe was read; run the command again")
    kinds: dict[str, set[str]] = {kind: set() for kind in ("sha256", "image_id", "phash", "url", "domain")}
    for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        kind = _kind_of(entry)
        if kind is None:
            raise ValueError(
                f"{path}, line {number}: {entry[:80]!r} is neither a sha256 (64 hexadecimal digits), an image_id (32), "
                "a pHash (16), a URL nor a domain"
            )
        kinds[kind].add(entry if kind == "url" else entry.lower())
    phashes = np.array(sorted(int(entry, 16) for entry in kinds["phash"]), np.uint64)
    return Entries(
        frozenset(kinds["sha256"]),
        frozenset(kinds["image_id"]),
        phashes,
        frozenset(kinds["url"]),
        frozenset(kinds["domain"]),
    )


def _kind_of(entry: str) -> str | None:
    if _HEX.fullmatch(entry.lower()) and len(entry) in (16, 32, 64):
        return {16: "phash", 32: "image_id", 64: "sha256"}[len(entry)]
    if "://" in entry:
        return "url"
    return "domain" if re.fullmatch(r"[\w-]+(\.[\w-]+)+", entry) else None


def domain_of(url: str | None) -> str:
    """The host that a URL names, in lower case, without port; "" where it names none."""
    try:
        return (urlsplit(url or "").hostname or "").lower().rstrip(".")
    except ValueError:
        return ""


def is_under(host: str, domains: frozenset[str]) -> str | None:
    """The domain of `domains` that `host` is or lies under, or None."""
    parts = host.split(".")
    return next((domain for n in range(len(parts)) if (domain := ".".join(parts[n:])) in domains), None)


@dataclass(frozen=True, kw_only=True)
class _ListRule(Rule):
    """Base of rules with a list file: the file's digest belongs to the rule's identity, its place does not.

    digest: the file's sha256, always found anew when the recipe is read.
    """

    guards: ClassVar[bool] = True
    file: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        if not self.file:
            object.__setattr__(self, "digest", "")
            return
        if not Path(self.file).is_file():
            raise ValueError(f"list file {self.file!r} is not there; give its path from here, or an absolute one")
        object.__setattr__(self, "digest", file_digest(self.file))
        # A wrong line is told where the recipe is read, not on some worker.
        self.entries()

    def entries(self) -> Entries:
        if not self.file:
            return Entries(frozenset(), frozenset(), np.zeros(0, np.uint64), frozenset(), frozenset())
        return read_entries(self.file, self.digest)

    def options(self) -> dict[str, Any]:
        return {**asdict(self), "file": Path(self.file).name}


@dataclass(frozen=True, kw_only=True)
class KnownBad(_ListRule):
    """Drops pictures on a list: by sha256 or image_id exactly, by pHash within `radius` bits (0 to 16).

    phash: the column of 64-bit perceptual hashes that the list's pHashes are held against; "" where it has none.
    """

    type: ClassVar[str] = "known_bad"
    phash: str = ""
    radius: int = 4

    def __post_init__(self) -> None:
        if not self.file:
            raise ValueError("known_bad: write file: the list of sha256, image_id or pHash")
        if not 0 <= self.radius <= 16:
            raise ValueError(f"known_bad: radius {self.radius} is not from 0 to 16 bits")
        super().__post_init__()
        if len(self.entries().phashes) and not self.phash:
            raise ValueError(f"known_bad: {self.file} lists pHashes; name their column, as in phash: hash.phash")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("sha256", "image_id", *((self.phash,) if self.phash else ()))

    def threshold_text(self) -> str:
        return f"not on {Path(self.file).name}" + (f", {self.radius} bits and nearer" if self.phash else "")

    def judge(self, table: Table) -> Verdicts:
        entries = self.entries()
        reasons: dict[int, str] = {}
        for column, listed in (("sha256", entries.sha256), ("image_id", entries.image_ids)):
            for row, value in enumerate(table[column].tolist()):
                if value in listed:
                    reasons.setdefault(row, f"known bad: {column}")
        distance = np.full(len(table["sha256"]), np.nan)
        if self.phash and len(entries.phashes):
            distance = _nearest_bits(table[self.phash], entries.phashes)
            for row in np.flatnonzero(distance <= self.radius).tolist():
                reasons.setdefault(row, f"known bad: pHash {int(distance[row])} bits away")
        rejected = np.zeros(len(distance), bool)
        rejected[list(reasons)] = True
        return Verdicts(rejected, distance, float(self.radius) if self.phash else float("nan"), reasons)


def _nearest_bits(hashes: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """For each 64-bit hash the number of bits to the nearest one listed; NaN where a row has no hash."""
    nearest = np.full(len(hashes), np.nan)
    held = np.flatnonzero(~np.isnan(hashes)) if hashes.dtype.kind == "f" else np.arange(len(hashes))
    mine = hashes[held].astype(np.uint64)
    best = np.full(len(held), 64, np.int64)
    for one in listed:
        np.minimum(best, np.bitwise_count(mine ^ one), out=best)
    nearest[held] = best
    return nearest


@dataclass(frozen=True, kw_only=True)
class OptOut(_ListRule):
    """Drops what its owner does not want used: by robots tags, licence, domain, or a takedown list.

    tags: column of robots-style tags (the X-Robots-Tag header, or a page's robots), as text in any notation; a row with
    one of `refuse` in it is dropped, whichever agent the tag is addressed to. licence: column of licences, of which
    only `licences` are kept (nothing is asked where that is empty; a row without one is dropped where it is not).
    domains: hosts, subdomains included, whose URLs are refused, beside those of `file`. A column may be spelled
    `metadata.<key>`: that key of the JSON in the column `metadata`, where readers leave what a dataset says of a row.
    """

    type: ClassVar[str] = "opt_out"
    tags: str = ""
    refuse: tuple[str, ...] = NO_AI_TAGS
    licence: str = ""
    licences: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.licence) != bool(self.licences):
            raise ValueError("opt_out: licence (a column) and licences (those that are kept) belong together")
        if not (self.tags or self.licence or self.domains or self.file):
            raise ValueError("an opt_out rule asks nothing: give tags, licence and licences, domains or file")
        super().__post_init__()

    @property
    def needs(self) -> tuple[str, ...]:
        more = [_column_of(name) for name in (self.tags, self.licence) if name]
        return ("sha256", "image_id", "url", *dict.fromkeys(more))

    def threshold_text(self) -> str:
        parts = {
            "tags": ", ".join(self.refuse) if self.tags else "",
            "licences": ", ".join(self.licences),
            "domains": f"{len(self.domains)} domains" if self.domains else "",
            "list": Path(self.file).name,
        }
        return "; ".join(f"{name} {text}" for name, text in parts.items() if text)

    def judge(self, table: Table) -> Verdicts:
        entries = self.entries()
        domains = entries.domains | {domain.lower() for domain in self.domains}
        licences = {_plain(licence) for licence in self.licences}
        rejected = np.zeros(len(table["sha256"]), bool)
        reasons: dict[int, str] = {}
        for row in range(len(rejected)):
            reason = self._reason({name: table[name][row] for name in self.needs}, entries, domains, licences)
            if reason:
                rejected[row], reasons[row] = True, reason
        return Verdicts(rejected, np.full(len(rejected), np.nan), reasons=reasons)

    def _reason(
        self, row: Mapping[str, Any], entries: Entries, domains: frozenset[str], licences: Iterable[str]
    ) -> str | None:
        if row["sha256"] in entries.sha256 or row["image_id"] in entries.image_ids or row["url"] in entries.urls:
            return "opt-out: on the takedown list"
        if domain := is_under(domain_of(row["url"]), domains):
            return f"opt-out: domain {domain}"
        if self.tags:
            found = tags_of(_value_of(row, self.tags)) & {tag.lower() for tag in self.refuse}
            if found:
                return f"opt-out: {', '.join(sorted(found))}"
        if self.licence:
            licence = _value_of(row, self.licence)
            if _plain(licence) not in licences:
                return f"opt-out: licence {str(licence or 'not given')[:60]}"
        return None


def _column_of(name: str) -> str:
    return "metadata" if name.startswith("metadata.") else name


def _value_of(row: Mapping[str, Any], name: str) -> Any:
    """A column's value, or for `metadata.<key>` that key of its JSON; None where there is none."""
    if not name.startswith("metadata."):
        return row[name]
    try:
        told = json.loads(row["metadata"] or "{}")
    except ValueError:
        return None
    return told.get(name.removeprefix("metadata.")) if isinstance(told, dict) else None


def tags_of(value: Any) -> frozenset[str]:
    """The words of robots-style tags in lower case: a header, JSON text, or a list."""
    text = " ".join(map(str, value)) if isinstance(value, list | tuple | np.ndarray) else str(value or "")
    return frozenset(re.findall(r"[a-z][a-z_-]*", text.lower()))


def _plain(licence: Any) -> str:
    """A licence's name without case and marks: "CC-BY 4.0" and "cc by 4.0" are one."""
    return re.sub(r"[^a-z0-9]+", " ", str(licence or "").lower()).strip()
