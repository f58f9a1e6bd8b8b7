"""Semantic duplicates against the plain way: every cosine in double precision, keepers taken one by one."""

import numpy as np
import pytest

from stages import semantic
from stages.dedupe import HELD
from stages.semantic import SemanticDuplicates, assign


def make_table(vectors: np.ndarray, pixels=None, uids=None) -> dict[str, np.ndarray]:
    count = len(vectors)
    names = np.empty(count, object)
    names[:] = uids if uids is not None else [f"{row:032x}" for row in range(count)]
    return {
        "uid": names,
        "shard": np.zeros(count, np.int32),
        "index": np.arange(count),
        "decode.pixels": np.array(pixels if pixels is not None else [1] * count),
        "size_bytes": np.ones(count, np.int64),
        "clip.image_embedding": vectors.astype(np.float16),
    }


def plainly_dropped(table: dict[str, np.ndarray], eps: float, cluster: np.ndarray) -> dict[int, tuple[int, float]]:
    vectors = table["clip.image_embedding"].astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = range(len(vectors))
    order = sorted(rows, key=lambda row: (-table["decode.pixels"][row], table["uid"][row], row))
    kept: list[int] = []
    dropped = {}
    for row in order:
        near = [
            (1 - float(vectors[row] @ vectors[other]), place, other)
            for place, other in enumerate(kept)
            if cluster[row] == cluster[other] and 1 - vectors[row] @ vectors[other] <= eps
        ]
        if near:
            dropped[row] = (min(near)[2], min(near)[0])
        else:
            kept.append(row)
    return dropped


def grouped_vectors(rng, groups: int, count: int, noise: float, size: int = 32) -> np.ndarray:
    directions = rng.standard_normal((groups, size))
    return directions[rng.integers(0, groups, count)] + noise * rng.standard_normal((count, size))


@pytest.mark.parametrize("tile", [16, 2048])
@pytest.mark.parametrize("clusters", [0, 5])
def test_rows_dropped_keepers_and_distances_equal_the_plain_way(monkeypatch, tile, clusters):
    monkeypatch.setattr(semantic, "TILE", tile)
    rng = np.random.default_rng(clusters)
    table = make_table(grouped_vectors(rng, 20, 300, 0.2), pixels=rng.integers(1, 4, 300))
    rule = SemanticDuplicates(eps=0.05, clusters=clusters)
    cluster = assign(table["clip.image_embedding"], rule.fit(table, 300)["centroids"])
    answer = rule.judge(table)
    expected = plainly_dropped(table, 0.05, cluster)
    assert 50 < len(expected) < 290
    found = {int(row): (int(answer.keeper[row]), answer.distance[row]) for row in np.flatnonzero(answer.rejected)}
    assert {row: keeper for row, (keeper, _) in found.items()} == {row: keeper for row, (keeper, _) in expected.items()}
    assert [found[row][1] for row in expected] == pytest.approx([far for _, far in expected.values()], abs=1e-6)


def test_the_order_of_rows_changes_nothing():
    rng = np.random.default_rng(1)
    table = make_table(grouped_vectors(rng, 30, 400, 0.3))
    rule = SemanticDuplicates(eps=0.1, clusters=6)
    mixed = rng.permutation(400)
    first, second = rule.judge(table), rule.judge({name: column[mixed] for name, column in table.items()})
    assert set(table["uid"][first.rejected]) == set(table["uid"][mixed][second.rejected])
    assert first.distance[mixed].tolist() == pytest.approx(second.distance.tolist(), nan_ok=True, abs=0)


def test_a_chain_carries_no_further_than_eps():
    # 0, 10 and 20 degrees: neighbours have a cosine of 0.985, the ends one of 0.940.
    angles = np.radians([0, 10, 20])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    answer = SemanticDuplicates(eps=0.02).judge(make_table(vectors, pixels=[3, 2, 1]))
    assert answer.rejected.tolist() == [False, True, False]
    assert answer.keeper.tolist() == [-1, 0, -1]
    assert answer.distance[1] == pytest.approx(1 - np.cos(angles[1]), abs=1e-3)


def test_a_group_keeps_one_representative_with_most_pixels():
    answer = SemanticDuplicates().judge(make_table(np.tile([[0.2, -0.5, 0.8]], (4, 1)), pixels=[1, 5, 9, 2]))
    assert answer.rejected.tolist() == [True, True, False, True]
    assert answer.keeper.tolist() == [2, 2, -1, 2]


def test_embeddings_that_say_nothing_are_compared_with_nothing():
    vectors = np.array(
        [[1, 1, 1, 1], [1.005, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [np.nan, 1, 0, 0], [np.nan, 1, 0, 0], [1, 0, 0, 0]]
    )
    assert not SemanticDuplicates(eps=0.5).judge(make_table(vectors)).rejected.any()


def test_held_rows_are_keepers_whatever_their_size():
    vectors = np.tile([[0.2, -0.5, 0.8]], (3, 1))
    table = {**make_table(vectors, pixels=[9, 1, 1]), HELD: np.array([False, True, True])}
    answer = SemanticDuplicates().judge(table)
    assert answer.rejected.tolist() == [True, False, False]
    assert answer.keeper[0] in (1, 2)


def test_clusters_are_chosen_by_rows_and_the_sample_is_that_of_the_whole(monkeypatch):
    rule = SemanticDuplicates()
    assert [rule.cluster_count(rows) for rows in (10, 16384, 1_000_000)] == [1, 1, 1000]
    monkeypatch.setattr(semantic, "SAMPLE_PER_CLUSTER", 64)
    rng = np.random.default_rng(0)
    table = make_table(rng.standard_normal((500, 8)), uids=[f"{uid:032x}" for uid in rng.permutation(500)])
    rule = SemanticDuplicates(clusters=2)
    whole = set(table["uid"][rule.sample(table, 500)])
    assert len(whole) == 2 * 64
    halves = [{name: column[part] for name, column in table.items()} for part in (slice(0, 250), slice(250, 500))]
    parts = [set(half["uid"][rule.sample(half, 500)]) for half in halves]
    assert whole <= parts[0] | parts[1]


def test_no_rows_at_all_have_no_duplicates():
    assert not SemanticDuplicates().judge(make_table(np.empty((0, 4)))).rejected.any()


@pytest.mark.parametrize("options", [{"eps": 0}, {"eps": 1}, {"clusters": -1}])
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match="semantic_duplicates"):
        SemanticDuplicates(**options)
