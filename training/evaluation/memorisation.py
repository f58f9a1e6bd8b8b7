"""Does a model repeat its training pictures? And does what it learned from hold the benchmark itself?

    found = copies(drawn, training, threshold=calibrated(held_out, training))

Drawings of training captions are compared with every training picture in two spaces: cosine of embeddings finds the
nearest, and the pHash of that one has to lie within a radius too. How near is too near is not a constant: pictures of a
plain world are alike by nature. The threshold is what pictures that nobody trained on (held out) do not reach; what
share of those it still calls copies is measured on the half that did not set it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.evaluation.statistics import Estimate, rate

RADIUS_BITS = 8  # of a 64-bit pHash, as near-duplicates have it
ALIKE = 0.995  # cosine from which two training pictures count as the same one, planted several times
SAME_BITS = 4
LEAST = 0.9  # cosine below which nothing is a copy, whatever the held-out pictures say
ROWS = 1024


@dataclass(frozen=True)
class Pictures:
    """Unit-length embeddings (N, D) and 64-bit pHashes (N,) of pictures."""

    embeddings: np.ndarray
    hashes: np.ndarray

    def __len__(self) -> int:
        return len(self.hashes)

    @classmethod
    def of(cls, embeddings: Sequence[Any], hashes: Sequence[Any]) -> Pictures:
        """From columns of vectors and of hashes. Raises ValueError for rows without either."""
        if any(one is None for one in (*embeddings, *hashes)):
            raise ValueError("memorisation: pictures without an embedding or a hash must be left out before")
        rows = np.asarray([np.asarray(one, np.float32) for one in embeddings], np.float32)
        return cls(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.asarray(hashes, np.uint64))

    def some(self, places: Any) -> Pictures:
        return Pictures(self.embeddings[places], self.hashes[places])


@dataclass(frozen=True)
class Nearest:
    """For each picture its nearest training picture: place, cosine, and bits between the pHashes."""

    place: np.ndarray
    cosine: np.ndarray
    bits: np.ndarray


def nearest(pictures: Pictures, training: Pictures) -> Nearest:
    """The training picture with the highest cosine for each picture, exact."""
    place = np.empty(len(pictures), np.int64)
    cosine = np.empty(len(pictures), np.float32)
    for start in range(0, len(pictures), ROWS):
        block = pictures.embeddings[start : start + ROWS] @ training.embeddings.T
        place[start : start + ROWS] = block.argmax(1)
        cosine[start : start + ROWS] = block.max(1)
    bits = np.bitwise_count(pictures.hashes ^ training.hashes[place]).astype(np.int64)
    return Nearest(place, cosine, bits)


@dataclass(frozen=True)
class Threshold:
    """cosine from which, within RADIUS_BITS, a drawing counts as a copy. false_alarms: of pictures never trained on."""

    cosine: float
    false_alarms: Estimate


def calibrated(held_out: Pictures, training: Pictures, seed: int = 0) -> Threshold:
    """The threshold that no picture of one half of `held_out` reaches; its false alarms on the other half."""
    if len(held_out) < 20:
        raise ValueError(
            f"memorisation: {len(held_out)} held-out pictures cannot say how near is too near: 20 at least"
        )
    order = np.random.default_rng([seed, 17]).permutation(len(held_out))
    found = nearest(held_out, training)
    first, second = order[::2], order[1::2]
    close = found.bits <= RADIUS_BITS
    highest = float(found.cosine[first][close[first]].max(initial=LEAST))
    # A quarter of the way from there to an exact copy: the highest of some says little about the highest of all.
    cosine = highest + (1 - highest) / 4
    return Threshold(cosine, rate((close & (found.cosine >= cosine))[second]))


@dataclass(frozen=True)
class Copies:
    """is_copy, near: of every drawing. by_copies: times that the nearest picture stood in the training set -> rate."""

    is_copy: np.ndarray
    near: Nearest
    overall: Estimate
    by_copies: Mapping[int, Estimate]


def copies(drawn: Pictures, training: Pictures, threshold: Threshold, of: Sequence[int] | None = None) -> Copies:
    """Which drawings repeat a training picture.

    of: the training picture whose caption prompted each drawing; rates are then also given by how often that picture
    stood in the training set.
    """
    found = nearest(drawn, training)
    flags = (found.cosine >= threshold.cosine) & (found.bits <= RADIUS_BITS)
    by_copies: dict[int, Estimate] = {}
    if of is not None:
        times = times_planted(training, of)
        for count in sorted(set(times.tolist())):
            by_copies[count] = rate(flags[times == count])
    return Copies(flags, found, rate(flags), by_copies)


def times_planted(training: Pictures, places: Sequence[int]) -> np.ndarray:
    """How many training pictures are the same as those at `places`, itself included."""
    chosen = training.some(np.asarray(places))
    found = np.empty(len(chosen), np.int64)
    for start in range(0, len(chosen), ROWS):
        part = chosen.some(slice(start, start + ROWS))
        alike = part.embeddings @ training.embeddings.T >= ALIKE
        near = np.bitwise_count(part.hashes[:, None] ^ training.hashes[None, :]) <= SAME_BITS
        found[start : start + ROWS] = (alike & near).sum(1)
    return found


# --- contamination ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contamination:
    """How much of the benchmark a model's training rows hold. problem: why that is not known, where it is not."""

    prompts: int = 0
    of_prompts: int = 0
    pictures: int = 0
    of_pictures: int = 0
    snapshots: tuple[str, ...] = ()
    problem: str = ""


def contamination(addresses: Mapping[str, str], prompts: Iterable[str], image_ids: Iterable[str]) -> Contamination:
    """Ask the ledgers of the snapshots that a model learned from (id -> address) for benchmark prompts and pictures.

    Prompts are compared with captions of training rows in lower case, pictures by the digest of their bytes.
    """
    texts = sorted({" ".join(text.lower().split()) for text in prompts})
    ids = sorted(set(image_ids))
    seen_texts, seen_ids, unread = set(), set(), []
    for name, address in addresses.items():
        if not address:
            unread.append(f"neither the catalog nor --data says where snapshot {name[:12]} lies")
            continue
        try:
            texts_here, ids_here = _held(address, texts, ids)
        except (ValueError, OSError) as problem:
            unread.append(f"snapshot {name[:12]} cannot be read ({problem})")
            continue
        seen_texts |= texts_here
        seen_ids |= ids_here
    unknown = "; ".join(unread) or ("" if addresses else "it is not known what this model learned from")
    return Contamination(len(seen_texts), len(texts), len(seen_ids), len(ids), tuple(addresses), unknown)


def _held(address: str, texts: list[str], ids: list[str]) -> tuple[set[str], set[str]]:
    from pipelines.lineage.ledger import open_ledger

    trained = "verdict = 'kept' AND (split IS NULL OR split = 'train')"
    with open_ledger(address) as ledger:
        rows = ledger.rows(
            "SELECT DISTINCT words AS text FROM (SELECT uid, regexp_replace(trim(lower(text)), '\\s+', ' ', 'g') AS "
            "words FROM captions) WHERE words IN (SELECT unnest(?)) AND uid IN "
            f"(SELECT uid FROM ledger WHERE {trained})",
            [texts],
        )
        found = ledger.rows(
            f"SELECT DISTINCT image_id FROM ledger WHERE {trained} AND image_id IN (SELECT unnest(?))", [ids]
        )
    return {row["text"] for row in rows}, {row["image_id"] for row in found}
