"""Duplicates against the plain way of finding them, and the cases that fool a hash."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stages.dedupe import HELD, ExactDuplicates, NearDuplicates, thumbnail_distance
from tests.reference.near_duplicates import dropped


def flip(value: int, bits) -> int:
    for bit in bits:
        value ^= 1 << int(bit)
    return value


def clustered_hashes(rng, count: int, edits: int) -> np.ndarray:
    """Random hashes, and copies of them with up to 12 bits flipped."""
    base = [int(value) for value in rng.integers(0, 2**64, count, dtype=np.uint64)]
    near = [flip(base[rng.integers(count)], rng.choice(64, rng.integers(0, 13), replace=False)) for _ in range(edits)]
    return np.array(base + near, np.uint64)


def make_table(rows: list[dict]) -> dict[str, np.ndarray]:
    def objects(name):
        column = np.empty(len(rows), object)
        column[:] = [row[name] for row in rows]
        return column

    return {
        "uid": objects("uid"),
        "shard": objects("shard"),
        "index": np.array([row["index"] for row in rows]),
        "decode.pixels": np.array([row["pixels"] for row in rows]),
        "size_bytes": np.array([row["size_bytes"] for row in rows]),
        "hash.phash64": np.array([row["hash"] for row in rows], np.uint64),
        "hash.thumbnail": objects("look"),
    }


def random_rows(seed: int, count: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    looks = [bytes([shade]) * 192 for shade in (40, 120, 200)]
    return [
        {
            "uid": f"{rng.integers(count):04d}",
            "shard": f"s{rng.integers(3)}",
            "index": index,
            "pixels": int(rng.choice([100, 200])),
            "size_bytes": int(rng.integers(3)),
            "hash": value,
            "look": looks[rng.integers(3)],
        }
        for index, value in enumerate(clustered_hashes(rng, count // 3, count - count // 3))
    ]


def same_look(left: bytes, right: bytes) -> bool:
    arrays = [np.frombuffer(look, np.uint8)[None] for look in (left, right)]
    return bool(thumbnail_distance(*arrays)[0] <= 0.04)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), radius=st.sampled_from([0, 4, 8]))
@example(seed=1366, radius=8)  # a copy of a dropped row, with a nearer row kept between the two
def test_rows_dropped_keepers_and_distances_equal_the_plain_way(seed, radius):
    rows = random_rows(seed, 60)
    answer = NearDuplicates(radius=radius).judge(make_table(rows))
    expected = dropped(rows, radius, same_look)
    found = {int(r): (int(answer.keeper[r]), int(answer.distance[r])) for r in np.flatnonzero(answer.rejected)}
    assert found.keys() == expected.keys()
    # Keepers with equal hash and look are one and the same to a duplicate; the distance says they are equally near.
    assert {row: distance for row, (_, distance) in found.items()} == {r: d for r, (_, d) in expected.items()}


def test_the_order_of_rows_changes_nothing():
    rows = random_rows(7, 80)
    mixed = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    by_row = [
        {
            (part[r]["uid"], part[r]["shard"], part[r]["index"])
            for r in np.flatnonzero(NearDuplicates().judge(make_table(part)).rejected)
        }
        for part in (rows, mixed)
    ]
    assert by_row[0] == by_row[1]


def row(name: str, value: int, pixels: int = 100, look: bytes = b"\x80" * 192, size_bytes: int = 1) -> dict:
    return {
        "uid": name, "shard": "s", "index": 0, "pixels": pixels, "size_bytes": size_bytes, "hash": value, "look": look
    }  # fmt: skip


def test_a_chain_does_not_carry_further_than_the_radius():
    # a ~ b ~ c, a and c 12 bits apart: b goes for a, c stays, since b, its only neighbour, was not kept.
    a, b, c = 0, flip(0, range(6)), flip(0, range(12))
    answer = NearDuplicates(radius=6).judge(make_table([row("a", a, 300), row("b", b, 200), row("c", c, 100)]))
    assert answer.rejected.tolist() == [False, True, False]


def test_the_keeper_has_most_pixels_then_most_bytes():
    answer = NearDuplicates().judge(
        make_table([row("a", 0, 100), row("b", 0, 200, size_bytes=1), row("c", 0, 200, size_bytes=2)])
    )
    assert answer.rejected.tolist() == [True, True, False]
    assert answer.keeper.tolist() == [2, 2, -1]


def test_plain_pictures_of_different_colours_share_a_hash_and_are_all_kept():
    colours = [bytes(rgb) * 64 for rgb in ((255, 255, 255), (255, 0, 0), (0, 0, 255))]
    table = make_table([row(name, 0x8000000000000000, look=look) for name, look in zip("abc", colours, strict=True)])
    assert not NearDuplicates().judge(table).rejected.any()
    assert NearDuplicates(second_look=None).judge(table).rejected.sum() == 2


def test_a_brighter_copy_still_looks_the_same():
    rng = np.random.default_rng(0)
    look = rng.integers(20, 200, 192)
    brighter = np.clip(look * 1.2, 0, 255).astype(np.uint8)
    assert thumbnail_distance(look.astype(np.uint8)[None], brighter[None])[0] < 0.01


def test_exact_duplicates_keep_the_first_occurrence():
    table = make_table([row("b", 0), row("a", 0), row("c", 0)])
    table["image_id"] = np.array(["x", "x", "y"], object)
    answer = ExactDuplicates().judge(table)
    assert answer.rejected.tolist() == [True, False, False]
    assert answer.keeper.tolist() == [1, -1, -1]


def test_a_row_that_is_held_already_keeps_its_place_whatever_comes():
    # A held row is small, and near another held one: both stay, and the larger newcomers go for them.
    rows = [row("new", 1, 900), row("held", 0, 10), row("held too", 3, 10), row("far", 2**64 - 1)]
    table = {**make_table(rows), HELD: np.array([False, True, True, False])}
    answer = NearDuplicates(radius=4).judge(table)
    assert answer.rejected.tolist() == [True, False, False, False]
    assert (answer.keeper[0], answer.distance[0]) == (1, 1)


def test_a_byte_copy_of_a_held_row_goes_for_it_and_held_copies_stay():
    rows = [row("a", 0), row("b", 0), row("c", 0), row("d", 0)]
    table = {**make_table(rows), HELD: np.array([False, True, True, False])}
    table["image_id"] = np.array(["x", "x", "x", "y"], object)
    answer = ExactDuplicates().judge(table)
    assert answer.rejected.tolist() == [True, False, False, False]
    assert answer.keeper[0] == 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_against_held_rows_equals_the_plain_way_with_those_first(seed):
    rows = random_rows(seed, 60)
    held = np.random.default_rng(seed).random(len(rows)) < 0.3
    answer = NearDuplicates(radius=8).judge({**make_table(rows), HELD: held})
    # Held rows that decide nothing about each other: every one is a keeper from the start.
    expected = dropped(rows, 8, same_look, held=held.tolist())
    found = {int(r): int(answer.distance[r]) for r in np.flatnonzero(answer.rejected)}
    assert found == {row: distance for row, (_, distance) in expected.items()}


def test_no_rows_at_all_have_no_duplicates():
    table = make_table([])
    table["image_id"] = np.array([], object)
    assert not ExactDuplicates().judge(table).rejected.any()
    assert not NearDuplicates().judge(table).rejected.any()


def test_rows_without_bytes_are_nobodys_copies():
    table = make_table([row("a", 0), row("b", 0), row("c", 0)])
    table["image_id"] = np.array([None, "00ff" * 8, None], object)
    assert not ExactDuplicates().judge(table).rejected.any()
    assert set(ExactDuplicates().part_of(table, 3, {})) <= {0, 1, 2}


def test_a_radius_that_cannot_be_searched_completely_is_refused():
    with pytest.raises(ValueError, match="radius 12"):
        NearDuplicates(radius=12)
