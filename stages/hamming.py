"""All pairs of 64-bit hashes within a radius of bits: complete, exact, each pair once, in bounded pieces.

Cut 64 bits into m blocks. Two hashes at most r bits apart agree on at least m - r of them, so sorting once for each
choice of m - r blocks, those blocks in front, brings every such pair into one bucket (Manku, Jain and Das Sarma,
"Detecting Near-Duplicates for Web Crawling", 2007). A pair is reported from the first choice it agrees on and no other,
so tables can be searched anywhere and in any order and nothing has to be compared afterwards. m is chosen by a cost
model of sorting and comparing. Buckets that real, clustered hashes overfill are searched the same way over their
remaining bits.

The values themselves are sorted, never an index beside them: numpy sorts bare 64-bit integers an order of magnitude
faster. Rows are looked up for the few values that are found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np

HASH_BITS = 64
CHUNK = 1 << 16  # values compared at once: they and what is made of them stay in a core's cache
BLOCK = 1 << 20  # sorted values whose buckets are looked up at once
PIECE_PAIRS = 1 << 18  # pairs of rows handed out at once: the second look holds two thumbnails of each as floats
CROWDED = 2048  # a bucket of more values is searched over its remaining bits
MOST_TABLES = 20_000

# Cost model, nanoseconds on one 2026 server core: a table at all, a value laid out and sorted for it, two compared.
TABLE_NS, SORT_NS, COMPARE_NS = 2e5, 60.0, 8.0

# Neighbouring bits of a DCT hash are correlated; blocks of bits far apart fill their buckets more evenly.
_STRIDE = 37


@dataclass(frozen=True)
class Tables:
    """How a search is cut: `bits` high bits of each value in `blocks` blocks, of which `agree` are equal in a table."""

    bits: int
    radius: int
    blocks: int

    @property
    def agree(self) -> int:
        return self.blocks - self.radius

    @property
    def count(self) -> int:
        return math.comb(self.blocks, self.agree)

    def bounds(self) -> list[int]:
        """First bit of each block counted from the top, and the end of the last."""
        return [self.bits * block // self.blocks for block in range(self.blocks + 1)]


@dataclass(frozen=True)
class _Layout:
    """One table: where bits move to (mask of bits, shift to the left), how many lead, and blocks that may not agree."""

    moves: tuple[tuple[int, int], ...]
    key_bits: int
    earlier_blocks: tuple[int, ...]


def choose_tables(count: int, radius: int, bits: int = HASH_BITS) -> Tables:
    """The cheapest complete cut for `count` values. As many blocks as the radius: one table, every pair compared."""

    def cost_ns(tables: Tables) -> float:
        key_bits = bits * tables.agree / tables.blocks if tables.blocks else 0.0
        return tables.count * (TABLE_NS + count * (SORT_NS + COMPARE_NS * count / 2**key_bits / 2))

    cuts = [Tables(bits, radius, blocks) for blocks in range(radius, min(bits, radius + 16) + 1)]
    return min((cut for cut in cuts if cut.count <= MOST_TABLES), key=cost_ns)


@cache
def _layouts(tables: Tables) -> tuple[_Layout, ...]:
    bounds = tables.bounds()
    masks = [((1 << (end - start)) - 1) << (HASH_BITS - end) for start, end in itertools.pairwise(bounds)]
    layouts = []
    for chosen in itertools.combinations(range(tables.blocks), tables.agree):
        others = [block for block in range(tables.blocks) if block not in chosen]
        moves: dict[int, int] = {}
        moved: dict[int, int] = {}
        place = key_bits = 0
        for block in (*chosen, *others):
            shift = bounds[block] - place
            moves[shift] = moves.get(shift, 0) | masks[block]
            moved[block] = _shifted(masks[block], shift)
            place += bounds[block + 1] - bounds[block]
            key_bits = place if block in chosen else key_bits
        earlier = tuple(moved[block] for block in others if chosen and block < chosen[-1])
        layouts.append(_Layout(tuple((mask, shift) for shift, mask in moves.items()), key_bits, earlier))
    return tuple(layouts)


def _shifted(mask: int, shift: int) -> int:
    return mask << shift if shift >= 0 else mask >> -shift


def _move_bits(values: np.ndarray, moves: Iterable[tuple[int, int]]) -> np.ndarray:
    moved = np.zeros_like(values)
    for mask, shift in moves:
        part = values & np.uint64(mask)
        moved |= part << np.uint64(shift) if shift >= 0 else part >> np.uint64(-shift)
    return moved


def table_pairs(
    chunks: Iterable[np.ndarray], tables: Tables, table: int, part: int = 0, parts: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of distinct values that table number `table` is the one to report, in pieces.

    chunks: the values, in any order and any number of arrays; equal ones count once. part, parts (a power of two): only
    the share of the table whose keys begin with `part`, so that no more than about 1 / parts of the values is held.
    """
    layout = _layouts(tables)[table]
    part_bits = min(parts.bit_length() - 1, layout.key_bits)
    if part >> part_bits:
        return
    laid_out = [np.empty(0, np.uint64)]
    for chunk in chunks:
        moved = np.empty_like(chunk)
        count = 0
        for start in range(0, len(chunk), CHUNK):
            some = _move_bits(chunk[start : start + CHUNK], layout.moves)
            if part_bits:
                some = some[some >> np.uint64(HASH_BITS - part_bits) == np.uint64(part)]
            moved[count : count + len(some)] = some
            count += len(some)
        laid_out.append(moved[:count] if count == len(chunk) else moved[:count].copy())
    values = np.concatenate(laid_out) if len(laid_out) != 2 else laid_out[1]
    del laid_out
    values.sort()
    is_new = values[1:] != values[:-1]
    if not is_new.all():
        values = np.append(values[:1], values[1:][is_new])
    del is_new
    back = [(_shifted(mask, shift), -shift) for mask, shift in layout.moves]
    for left, right in _bucket_pairs(values, layout.key_bits, tables):
        difference = left ^ right
        mine = np.ones(len(left), bool)
        for mask in layout.earlier_blocks:
            mine &= (difference & np.uint64(mask)) != 0
        if mine.any():
            yield _move_bits(left[mine], back), _move_bits(right[mine], back)


def _bucket_pairs(values: np.ndarray, key_bits: int, tables: Tables) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of sorted distinct values that share their first `key_bits` bits and differ in at most the radius."""
    start, low_bits = 0, np.uint64(HASH_BITS - key_bits)
    while start < len(values):
        stop = min(start + BLOCK, len(values)) if key_bits else len(values)
        if stop < len(values):
            # On to the end of the bucket that the block would cut: everything below the next key.
            last = values[stop - 1] | ((np.uint64(1) << low_bits) - np.uint64(1))
            stop = int(np.searchsorted(values, last, side="right"))
        yield from _block_pairs(values[start:stop], key_bits, tables)
        start = stop


def _block_pairs(values: np.ndarray, key_bits: int, tables: Tables) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`_bucket_pairs` of whole buckets."""
    count = len(values)
    starts, ends = np.array([0]), np.array([count])
    if key_bits:
        inner_ends = np.flatnonzero((values[1:] ^ values[:-1]) >> np.uint64(HASH_BITS - key_bits)) + 1
        starts, ends = np.append(0, inner_ends), np.append(inner_ends, count)
    lengths = ends - starts
    # How many values of its bucket come after each value.
    followers = np.repeat(ends, lengths) - np.arange(1, count + 1)
    if key_bits:
        for bucket in np.flatnonzero(lengths > CROWDED):
            first, last = starts[bucket], ends[bucket]
            inner = choose_tables(last - first, tables.radius, tables.bits - key_bits)
            if inner.agree:
                followers[first:last] = 0
                key = values[first] >> np.uint64(HASH_BITS - key_bits) << np.uint64(HASH_BITS - key_bits)
                rest = values[first:last] << np.uint64(key_bits)
                for table in range(inner.count):
                    for left, right in table_pairs([rest], inner, table):
                        yield key | left >> np.uint64(key_bits), key | right >> np.uint64(key_bits)
    for chunk in range(0, count, CHUNK):
        rows = np.flatnonzero(followers[chunk : chunk + CHUNK]) + chunk
        step = 1
        while len(rows):
            left, right = values[rows], values[rows + step]
            near = np.flatnonzero(np.bitwise_count(left ^ right) <= tables.radius)
            if len(near):
                yield left[near], right[near]
            step += 1
            rows = rows[followers[rows] >= step]


def spread(values: np.ndarray) -> np.ndarray:
    """Every bit moved to another place, neighbours far apart; distances stay. `unspread` moves them back."""
    return _permuted(values, _STRIDE)


def unspread(values: np.ndarray) -> np.ndarray:
    return _permuted(values, pow(_STRIDE, -1, HASH_BITS))


def _permuted(values: np.ndarray, stride: int) -> np.ndarray:
    lookup = _lookup(stride)
    words = np.ascontiguousarray(values, "<u8").view("<u2").reshape(-1, 4)
    moved = np.empty_like(values)
    for start in range(0, len(values), CHUNK):
        part = words[start : start + CHUNK]
        moved[start : start + CHUNK] = (
            lookup[0][part[:, 0]] | lookup[1][part[:, 1]] | lookup[2][part[:, 2]] | lookup[3][part[:, 3]]
        )
    return moved


@cache
def _lookup(stride: int) -> np.ndarray:
    """(4, 65536): where the bits of each 16-bit word of a value go when bit i goes to i * stride."""
    table = np.zeros((4, 1 << 16), np.uint64)
    words = np.arange(1 << 16, dtype=np.uint64)
    for bit in range(HASH_BITS):
        word, place = divmod(bit, 16)
        table[word] |= ((words >> np.uint64(place)) & np.uint64(1)) << np.uint64(bit * stride % HASH_BITS)
    return table


def value_pairs(values: np.ndarray, radius: int, workers: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of distinct uint64 `values` at most `radius` bits apart, in pieces. workers: threads, a table each."""
    tables = choose_tables(len(values), radius)
    moved = spread(values)

    def search(table: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(unspread(left), unspread(right)) for left, right in table_pairs([moved], tables, table)]

    if workers == 1:
        for table in range(tables.count):
            yield from search(table)
        return
    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(search, range(tables.count)):
            yield from found


def iterate_pairs(
    hashes: np.ndarray, radius: int, workers: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All pairs of rows (left < right) of N uint64 `hashes` within `radius` bits and their distances, in pieces.

    Each pair comes once; rows with equal hashes are pairs too. Pieces hold at most PIECE_PAIRS pairs.
    """
    if not len(hashes):
        return
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    lengths = np.diff(np.append(starts, len(ordered)))
    values = ordered[starts]
    equal = np.flatnonzero(lengths > 1)
    for left, right in cross_groups(order, starts, lengths, equal, equal):
        inside = left < right
        yield left[inside], right[inside], np.zeros(int(inside.sum()), np.int64)
    if radius == 0:
        return
    for one, other in value_pairs(values, radius, workers):
        a, b = np.searchsorted(values, one), np.searchsorted(values, other)
        for left, right in cross_groups(order, starts, lengths, a, b):
            bits = np.bitwise_count(hashes[left] ^ hashes[right]).astype(np.int64)
            yield np.minimum(left, right), np.maximum(left, right), bits


def cross_groups(
    order: np.ndarray, starts: np.ndarray, lengths: np.ndarray, a: np.ndarray, b: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every row of group a[i] with every row of group b[i], at most PIECE_PAIRS at once."""
    ends = np.cumsum(lengths[a] * lengths[b])
    total = int(ends[-1]) if len(ends) else 0
    for first in range(0, total, PIECE_PAIRS):
        flat = np.arange(first, min(first + PIECE_PAIRS, total))
        pair = np.searchsorted(ends, flat, side="right")
        within = flat - (ends[pair] - lengths[a[pair]] * lengths[b[pair]])
        row, column = np.divmod(within, lengths[b[pair]])
        yield order[starts[a[pair]] + row], order[starts[b[pair]] + column]


def hamming_pairs(hashes: np.ndarray, radius: int, workers: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs (left < right) of N uint64 hashes at most `radius` bits apart, in order, and their distances."""
    found = [(np.empty(0, np.int64),) * 3, *iterate_pairs(hashes, radius, workers)]
    left, right, bits = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((right, left))
    return left[order], right[order], bits[order]
