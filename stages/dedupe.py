"""Duplicates, exact and perceptual: barriers over small columns, with the keeper and the distance of every row dropped.

    rules:
      exact: {type: exact_duplicates}
      near:  {type: near_duplicates, hash: hash.phash64, thumbnail: hash.thumbnail, radius: 8}

Rows are taken in keeper order: most pixels, then most bytes, then occurrence. A row is dropped when it lies within the
radius of a *kept* row and the second look confirms it, so chains do not carry further than the radius, and the outcome
depends on neither the order of the input nor the number of workers.

All pairs within the radius are found, none is guessed: if two 64-bit hashes differ in at most r bits, one of their four
16-bit bands differs in at most floor(r / 4), so probing every band with every mask of that many bits is complete
(Norouzi et al., "Fast Search in Hamming Space with Multi-Index Hashing", 2012).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stages.rules import Rule, Table, Verdicts, occurrence_order

BANDS = 4
BAND_BITS = 16
PROBE_ROWS = 1 << 22  # candidate pairs held at once: 64 MB of indices


@dataclass(frozen=True, kw_only=True)
class ExactDuplicates(Rule):
    """Of occurrences with the same image bytes, keeps the first by occurrence."""

    type: ClassVar[str] = "exact_duplicates"
    barrier: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image_id",)

    def threshold_text(self) -> str:
        return "one of each image"

    def judge(self, table: Table) -> Verdicts:
        image_id = table["image_id"].astype("U")
        order = occurrence_order(table, image_id)
        keeper = np.full(len(image_id), -1, np.int64)
        first = 0
        for position in range(1, len(order)):
            if image_id[order[position]] == image_id[order[first]]:
                keeper[order[position]] = order[first]
            else:
                first = position
        rejected = keeper >= 0
        distance = np.where(rejected, 0.0, np.nan)
        reasons = dict.fromkeys(map(int, np.flatnonzero(rejected)), "same bytes as the keeper")
        return Verdicts(rejected, distance, 0.0, reasons, keeper=keeper, distance=distance)


@dataclass(frozen=True, kw_only=True)
class NearDuplicates(Rule):
    """Drops a row whose 64-bit hash lies within `radius` of a kept row's and whose colour thumbnail looks the same.

    radius: bits, 0..11. second_look: largest mean absolute difference of the 8x8 RGB thumbnails (0..1) after one gain
    has taken out a change of brightness; null trusts the hash alone.
    """

    type: ClassVar[str] = "near_duplicates"
    barrier: ClassVar[bool] = True
    hash: str = "hash.phash64"
    thumbnail: str = "hash.thumbnail"
    pixels: str = "decode.pixels"
    radius: int = 8
    second_look: float | None = 0.04

    def __post_init__(self) -> None:
        if not 0 <= self.radius <= 11:
            raise ValueError(f"radius {self.radius} of a near_duplicates rule is not in 0..11 bits of a 64-bit hash")

    @property
    def needs(self) -> tuple[str, ...]:
        looks = () if self.second_look is None else (self.thumbnail,)
        return (self.hash, *looks, self.pixels, "size_bytes")

    def threshold_text(self) -> str:
        return f"more than {self.radius} bits from every kept one"

    def judge(self, table: Table) -> Verdicts:
        count = len(table["uid"])
        order = occurrence_order(table, -table[self.pixels].astype(np.int64), -table["size_bytes"].astype(np.int64))
        hashes = table[self.hash][order].astype(np.uint64)
        looks = np.zeros((count, 0), np.uint8)
        if self.second_look is not None:
            looks = np.frombuffer(b"".join(table[self.thumbnail][order]), np.uint8).reshape(count, -1)
        leader = _first_equal(hashes, looks)
        heads = np.flatnonzero(leader == np.arange(count))
        left, right, bits = hamming_pairs(hashes[heads], self.radius)
        if self.second_look is not None and len(left):
            same = thumbnail_distance(looks[heads[left]], looks[heads[right]]) <= self.second_look
            left, right, bits = left[same], right[same], bits[same]
        keeper_of_head, distance_of_head = _greedy(len(heads), left, right, bits)

        head_position = np.zeros(count, np.int64)
        head_position[heads] = np.arange(len(heads))
        head = head_position[leader]
        kept_head = keeper_of_head[head]
        # A row equal to its head shares its fate: dropped for the head where that is kept, else for the head's keeper.
        keeper_rank = np.where(kept_head >= 0, heads[kept_head], np.where(leader != np.arange(count), leader, -1))
        distance_rank = np.where(kept_head >= 0, distance_of_head[head], np.where(keeper_rank >= 0, 0.0, np.nan))

        keeper = np.full(count, -1, np.int64)
        distance = np.full(count, np.nan)
        keeper[order] = np.where(keeper_rank >= 0, order[keeper_rank], -1)
        distance[order] = distance_rank
        rejected = keeper >= 0
        reasons = {int(row): f"{int(distance[row])} bits from the keeper" for row in np.flatnonzero(rejected)}
        return Verdicts(rejected, distance, float(self.radius), reasons, keeper=keeper, distance=distance)


def _first_equal(hashes: np.ndarray, looks: np.ndarray) -> np.ndarray:
    """For each row, the first row with the same hash and thumbnail (itself, mostly)."""
    record = np.concatenate([hashes[:, None].view(np.uint8), looks], axis=1)
    packed = np.ascontiguousarray(record).view(np.dtype((np.void, record.shape[1]))).ravel()
    _, first, inverse = np.unique(packed, return_index=True, return_inverse=True)
    return first[inverse]


def _greedy(count: int, left: np.ndarray, right: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keeper (or -1) and distance of `count` rows in keeper order, given the confirmed pairs left < right."""
    keeper = np.full(count, -1, np.int64)
    distance = np.full(count, np.nan)
    # By the later row, nearest first: when a row is looked at, the fate of every earlier one is known.
    for pair in np.lexsort((left, bits, right)):
        earlier, later = left[pair], right[pair]
        if keeper[later] < 0 and keeper[earlier] < 0:
            keeper[later], distance[later] = earlier, bits[pair]
    return keeper, distance


def thumbnail_distance(left_NC: np.ndarray, right_NC: np.ndarray) -> np.ndarray:
    """(N,) mean absolute difference (0..1) of thumbnails (N, C) uint8, after the gain in 0.7..1.43 that fits best."""
    left, right = left_NC.astype(np.float32) / 255, right_NC.astype(np.float32) / 255
    gain_N = (left * right).sum(1) / np.maximum((left * left).sum(1), 1e-6)
    gain_N = np.clip(gain_N, 0.7, 1 / 0.7)
    return np.abs(np.minimum(left * gain_N[:, None], 1) - right).mean(1)


def hamming_pairs(hashes: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs (left < right) of N uint64 hashes at most `radius` bits apart, and their distances; complete."""
    found_left, found_right = [], []
    masks = _masks(radius // BANDS)
    for band in range(BANDS):
        values = ((hashes >> np.uint64(band * BAND_BITS)) & np.uint64(0xFFFF)).astype(np.int64)
        rows = np.argsort(values, kind="stable")
        starts = np.searchsorted(values[rows], np.arange((1 << BAND_BITS) + 1))
        for mask in masks:
            for left, right in _probe(values ^ mask, rows, starts):
                later = left < right
                left, right = left[later], right[later]
                near = np.bitwise_count(hashes[left] ^ hashes[right]) <= radius
                found_left.append(left[near])
                found_right.append(right[near])
    pairs = np.concatenate(found_left) * len(hashes) + np.concatenate(found_right)
    pairs = np.unique(pairs)
    left, right = np.divmod(pairs, max(len(hashes), 1))
    return left, right, np.bitwise_count(hashes[left] ^ hashes[right]).astype(np.int64)


def _masks(flips: int) -> list[int]:
    """Every 16-bit mask with at most `flips` bits set."""
    return [
        sum(1 << bit for bit in bits)
        for count in range(flips + 1)
        for bits in itertools.combinations(range(BAND_BITS), count)
    ]


def _probe(targets: np.ndarray, rows: np.ndarray, starts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (row, member of the bucket it targets), in pieces of about PROBE_ROWS."""
    counts = starts[targets + 1] - starts[targets]
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    first = 0
    while first < len(targets) and total:
        last = int(np.searchsorted(ends, (ends[first - 1] if first else 0) + PROBE_ROWS, side="left")) + 1
        last = min(max(last, first + 1), len(targets))
        part = counts[first:last]
        left = np.repeat(np.arange(first, last), part)
        within = np.arange(len(left)) - np.repeat(np.cumsum(part) - part, part)
        yield left, rows[np.repeat(starts[targets[first:last]], part) + within]
        first = last
