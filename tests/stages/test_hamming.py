"""The search for pairs of hashes against looking at every pair: uniform, clustered and crowded ones, cut in any way."""

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stages import hamming
from stages.hamming import Tables, choose_tables, hamming_pairs, spread, table_pairs, unspread, value_pairs
from tests.reference.near_duplicates import pairs_within


def flipped(rng, values: np.ndarray, most: int) -> np.ndarray:
    """`values` with up to `most` random bits changed in each."""
    found = values.copy()
    for row, count in enumerate(rng.integers(0, most + 1, len(values))):
        for bit in rng.choice(64, count, replace=False):
            found[row] ^= np.uint64(1) << np.uint64(bit)
    return found


def clustered_hashes(rng, count: int, edits: int) -> np.ndarray:
    """Random hashes, and copies of them with up to 12 bits flipped."""
    base = rng.integers(0, 2**64, count, dtype=np.uint64)
    return np.concatenate([base, flipped(rng, rng.choice(base, edits), 12)])


def listed(hashes: np.ndarray, radius: int, workers: int = 1) -> list[tuple[int, int, int]]:
    return list(zip(*(column.tolist() for column in hamming_pairs(hashes, radius, workers)), strict=True))


@pytest.mark.parametrize("radius", range(12))
def test_every_pair_within_the_radius_is_found_once_and_no_other(radius):
    hashes = clustered_hashes(np.random.default_rng(radius), 250, 150)
    assert listed(hashes, radius) == pairs_within(hashes, radius)


@pytest.mark.parametrize("radius", [1, 3, 4, 8])
def test_every_cut_of_the_bits_finds_the_same_pairs_once_whatever_the_parts(radius):
    rng = np.random.default_rng(radius)
    values = np.unique(clustered_hashes(rng, 60, 60))
    expected = sorted((int(values[i]), int(values[j])) for i, j, _ in pairs_within(values, radius))
    for blocks in range(radius, radius + 4):
        tables = Tables(64, radius, blocks)
        for parts in (1, 8):
            found = [
                tuple(sorted((int(left), int(right))))
                for table in range(tables.count)
                for part in range(parts)
                for lefts, rights in table_pairs(np.array_split(values, 3), tables, table, part, parts)
                for left, right in zip(lefts, rights, strict=True)
            ]
            assert sorted(found) == expected


def test_crowded_buckets_are_searched_over_their_remaining_bits(monkeypatch):
    # Half of the bits never change, as in hashes of drawings: whole tables fall into a handful of buckets.
    rng = np.random.default_rng(3)
    hashes = rng.integers(0, 2**64, 700, dtype=np.uint64) & np.uint64(0xFFFF00000000FFFF)
    hashes = np.concatenate([hashes, flipped(rng, hashes[:100], 6)])
    # Comparing made dear, so that so few rows are cut into tables at all.
    monkeypatch.setattr(hamming, "COMPARE_NS", 1e5)
    monkeypatch.setattr(hamming, "CROWDED", 8)
    assert choose_tables(len(hashes), 4).agree > 0
    assert listed(hashes, 4) == pairs_within(hashes, 4)


def test_equal_hashes_are_pairs_at_distance_0_handed_out_in_bounded_pieces(monkeypatch):
    monkeypatch.setattr(hamming, "PIECE_PAIRS", 50)
    hashes = np.array([5] * 30 + [7] * 20 + [2**63] * 3, np.uint64)
    pieces = list(hamming.iterate_pairs(hashes, 2))
    assert max(len(left) for left, _, _ in pieces) <= 50
    assert listed(hashes, 2) == pairs_within(hashes, 2)


@pytest.mark.parametrize("hashes", [[], [3], [3, 3], [0, 2**64 - 1]])
def test_no_row_one_row_and_rows_far_apart(hashes):
    hashes = np.array(hashes, np.uint64)
    assert listed(hashes, 4) == pairs_within(hashes, 4)


def test_threads_find_what_one_finds():
    hashes = clustered_hashes(np.random.default_rng(5), 3000, 3000)
    assert listed(hashes, 4, workers=2) == listed(hashes, 4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_spreading_bits_keeps_distances_and_can_be_undone(numbers):
    values = np.array(numbers, np.uint64)
    moved = spread(values)
    assert (unspread(moved) == values).all()
    assert (np.bitwise_count(moved ^ moved[0]) == np.bitwise_count(values ^ values[0])).all()


def test_real_hashes_of_edited_pictures_are_found_as_imagehash_measures_them():
    rng = np.random.default_rng(0)
    hashes = []
    for _ in range(40):
        coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(
            (96, 80), Image.Resampling.BICUBIC
        )
        for box in ((0, 0, 96, 80), (2, 1, 96, 80), (0, 0, 92, 78), (5, 5, 90, 75)):
            hashes.append(imagehash.phash(coarse.crop(box)))
    values = np.array([int(str(one), 16) for one in hashes], np.uint64)
    expected = [
        (i, j, hashes[i] - hashes[j])
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if hashes[i] - hashes[j] <= 8
    ]
    assert len(expected) > 40
    assert listed(values, 8) == expected


def test_more_values_are_cut_into_more_blocks():
    cuts = [choose_tables(count, 4).blocks for count in (100, 10**5, 10**7, 10**9)]
    assert cuts == sorted(cuts)
    assert cuts[0] == 4  # so few are compared pair by pair
    assert cuts[-1] >= 7


def test_pairs_of_values_are_streamed():
    pieces = value_pairs(np.arange(1 << 10, dtype=np.uint64), 1)
    assert sum(len(left) for left, _ in pieces) == 10 * (1 << 10) // 2
