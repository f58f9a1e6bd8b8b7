"""Duplicates, exact and perceptual: barriers over small columns, with the keeper and the distance of every row dropped.

    rules:
      exact: {type: exact_duplicates}
      near:  {type: near_duplicates, hash: hash.phash64, thumbnail: hash.thumbnail, radius: 8}

Rows are taken in keeper order: most pixels, then most bytes, then occurrence. A row is dropped when it lies within the
radius of a *kept* row and the second look confirms it, so chains do not carry further than the radius, and the outcome
depends on neither the order of the input nor the number of workers.

All pairs within the radius are found, none is guessed (stages.hamming).

A table may bring rows that are held already, marked in the column HELD: they come before all others in keeper order
and are never dropped, so that a new crawl is deduplicated against what an earlier snapshot kept. A keeper may then be
one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stages.hamming import iterate_pairs
from stages.rules import Guide, Rule, Table, Verdicts, occurrence_order

# A boolean column that a table of a duplicate rule may have: True for rows that an earlier snapshot holds already.
HELD = "held"


@dataclass(frozen=True, kw_only=True)
class ExactDuplicates(Rule):
    """Of occurrences with the same image bytes, keeps the first by occurrence."""

    type: ClassVar[str] = "exact_duplicates"
    version: ClassVar[int] = 2  # rows without bytes are nobody's copies
    barrier: ClassVar[bool] = True
    separable: ClassVar[bool] = True
    takes_held: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image_id",)

    def threshold_text(self) -> str:
        return "one of each image"

    def part_of(self, table: Table, parts: int, guide: Guide) -> np.ndarray:
        return np.array([int((one or "0")[:8], 16) % parts for one in table["image_id"].tolist()], np.int64)

    def judge(self, table: Table) -> Verdicts:
        image_id = table["image_id"].astype("U")
        held = held_rows(table)
        order = occurrence_order(table, image_id, ~held)
        ordered = image_id[order]
        is_first = np.append(True, ordered[1:] != ordered[:-1])[: len(order)]
        first = order[np.flatnonzero(is_first)[np.cumsum(is_first) - 1]]
        keeper = np.full(len(image_id), -1, np.int64)
        # A row without bytes has no image_id, and is nobody's copy.
        nothing = np.array([one is None for one in table["image_id"].tolist()], bool)
        keeper[order] = np.where(is_first | held[order] | nothing[order], -1, first)
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
    separable: ClassVar[bool] = True
    takes_held: ClassVar[bool] = True
    guide: ClassVar[str] = "neighbours"
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

    def looks(self, table: Table) -> np.ndarray:
        """(N, C) uint8 thumbnails of a table's rows; C is 0 where the hash alone is trusted."""
        if self.second_look is None:
            return np.zeros((len(table["uid"]), 0), np.uint8)
        column = table[self.thumbnail]
        if column.ndim == 2:
            return column
        return np.frombuffer(b"".join(column), np.uint8).reshape(len(column), -1 if len(column) else 0)

    def looks_same(self, left_NC: np.ndarray, right_NC: np.ndarray) -> np.ndarray:
        """(N,) bool: whether the second look takes the right thumbnails for copies of the left ones."""
        if self.second_look is None:
            return np.ones(len(left_NC), bool)
        return thumbnail_distance(left_NC, right_NC) <= self.second_look

    def part_of(self, table: Table, parts: int, guide: Guide) -> np.ndarray:
        """Rows linked by confirmed pairs go together. guide: `nodes` (sorted) that have a neighbour, their `labels`."""
        nodes = nodes_of(table[self.hash].astype(np.uint64), self.looks(table))
        labels = nodes.copy()
        place = np.searchsorted(guide["nodes"], nodes)
        place[place == len(guide["nodes"])] = 0
        if len(guide["nodes"]):
            linked = guide["nodes"][place] == nodes
            labels[linked] = guide["labels"][place[linked]]
        return (labels % np.uint64(parts)).astype(np.int64)

    def judge(self, table: Table) -> Verdicts:
        count = len(table["uid"])
        held = held_rows(table)
        order = occurrence_order(
            table, ~held, -table[self.pixels].astype(np.int64), -table["size_bytes"].astype(np.int64)
        )
        hashes = table[self.hash][order].astype(np.uint64)
        looks = self.looks(table)[order]
        leader = _first_equal(hashes, looks)
        heads = np.flatnonzero(leader == np.arange(count))
        left, right, bits = self._confirmed_pairs(hashes[heads], looks[heads])
        keeper_of_head, distance_of_head = greedy_keepers(held[order][heads], left, right, bits)

        head_position = np.zeros(count, np.int64)
        head_position[heads] = np.arange(len(heads))
        head = head_position[leader]
        kept_head = keeper_of_head[head]
        # A row equal to its head shares its fate: dropped for the head where that is kept, else for the head's keeper,
        # also where a nearer row was kept in between. Copies of one picture name one keeper.
        keeper_rank = np.where(kept_head >= 0, heads[kept_head], np.where(leader != np.arange(count), leader, -1))
        distance_rank = np.where(kept_head >= 0, distance_of_head[head], np.where(keeper_rank >= 0, 0.0, np.nan))

        keeper = np.full(count, -1, np.int64)
        distance = np.full(count, np.nan)
        keeper[order] = np.where(keeper_rank >= 0, order[keeper_rank], -1)
        distance[order] = distance_rank
        keeper[held], distance[held] = -1, np.nan
        rejected = keeper >= 0
        reasons = {int(row): f"{int(distance[row])} bits from the keeper" for row in np.flatnonzero(rejected)}
        return Verdicts(rejected, distance, float(self.radius), reasons, keeper=keeper, distance=distance)

    def _confirmed_pairs(self, hashes: np.ndarray, looks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs (left < right) of rows within the radius that pass the second look, and their distances in bits."""
        found = [(np.empty(0, np.int64),) * 3]
        for left, right, bits in iterate_pairs(hashes, self.radius):
            same = self.looks_same(looks[left], looks[right])
            found.append((left[same], right[same], bits[same]))
        left, right, bits = (np.concatenate(column) for column in zip(*found, strict=True))
        return left, right, bits


def _first_equal(hashes: np.ndarray, looks: np.ndarray) -> np.ndarray:
    """For each row, the first row with the same hash and thumbnail (itself, mostly)."""
    record = np.concatenate([hashes[:, None].view(np.uint8), looks], axis=1)
    packed = np.ascontiguousarray(record).view(np.dtype((np.void, record.shape[1]))).ravel()
    _, first, inverse = np.unique(packed, return_index=True, return_inverse=True)
    return first[inverse]


def greedy_keepers(
    held: np.ndarray, left: np.ndarray, right: np.ndarray, distance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) keeper (or -1) and its distance of N rows in keeper order, given confirmed pairs left < right.

    held: (N,) bool, rows that are kept whatever lies near them.
    """
    keeper = [-1] * len(held)
    found = np.full(len(held), np.nan)
    fixed = held.tolist()
    # By the later row, nearest first: when a row is looked at, the fate of every earlier one is known.
    order = np.lexsort((left, distance, right))
    for earlier, later, apart in zip(
        left[order].tolist(), right[order].tolist(), distance[order].tolist(), strict=True
    ):
        if keeper[later] < 0 and keeper[earlier] < 0 and not fixed[later]:
            keeper[later], found[later] = earlier, apart
    return np.array(keeper, np.int64), found


def nodes_of(hashes: np.ndarray, looks: np.ndarray) -> np.ndarray:
    """(N,) uint64 digest of hash and thumbnail: rows with the same two are one node of the graph of near-duplicates."""
    words = np.zeros((len(looks), -(-looks.shape[1] // 8) * 8), np.uint8)
    words[:, : looks.shape[1]] = looks
    nodes = mixed(hashes)
    for column in words.view("<u8").T:
        nodes = mixed(nodes ^ column)
    return nodes


def mixed(values: np.ndarray) -> np.ndarray:
    """uint64 values with their bits stirred (the finaliser of SplitMix64), so that any of them can pick a part."""
    stirred = values + np.uint64(0x9E3779B97F4A7C15)
    stirred = (stirred ^ (stirred >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    stirred = (stirred ^ (stirred >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return stirred ^ (stirred >> np.uint64(31))


def held_rows(table: Table) -> np.ndarray:
    """(N,) bool: which rows of a table are held already."""
    return table[HELD].astype(bool) if HELD in table else np.zeros(len(table["uid"]), bool)


def thumbnail_distance(left_NC: np.ndarray, right_NC: np.ndarray) -> np.ndarray:
    """(N,) mean absolute difference (0..1) of thumbnails (N, C) uint8, after the gain in 0.7..1.43 that fits best."""
    left, right = left_NC.astype(np.float32) / 255, right_NC.astype(np.float32) / 255
    gain_N = (left * right).sum(1) / np.maximum((left * left).sum(1), 1e-6)
    gain_N = np.clip(gain_N, 0.7, 1 / 0.7)
    return np.abs(np.minimum(left * gain_N[:, None], 1) - right).mean(1)
