"""Balancing: planted clusters found and capped, the same rows whatever their order, chosen rows from the best."""

import numpy as np
import pytest

from stages.balance import Balance, cluster, effective

SIZES = (60, 25, 10, 5)


def planted(seed: int = 0) -> dict[str, np.ndarray]:
    """Four directions far apart in 16 dimensions with a little noise, 60, 25, 10 and 5 rows of them."""
    rng = np.random.default_rng(seed)
    concept = np.repeat(np.arange(4), SIZES)
    vectors = (np.eye(16)[concept] + rng.normal(0, 0.02, (100, 16))).astype(np.float16)
    names = [f"{i:03d}" for i in range(100)]
    return {
        "uid": np.array(names, object),
        "image_id": np.array(names, object),
        "shard": np.array(["s"] * 100, object),
        "index": np.arange(100),
        "clip.image_embedding": vectors,
        "clip.score": rng.random(100),
        "concept": concept,
    }


def kept(rule: Balance, table: dict[str, np.ndarray]) -> set[str]:
    return set(table["uid"][~rule.judge(table).rejected])


def sizes_of(table: dict[str, np.ndarray], uids: set[str]) -> list[int]:
    alive = np.array([uid in uids for uid in table["uid"]])
    return np.bincount(table["concept"][alive], minlength=4).tolist()


def test_planted_concepts_are_the_clusters():
    table = planted()
    found = Balance(clusters=4, max_share=1).judge(table).recorded
    assert len(set(zip(found.tolist(), table["concept"].tolist(), strict=True))) == 4


def test_max_share_caps_each_cluster_and_the_cut_says_what_it_did():
    answer = Balance(clusters=4, max_share=0.15).judge(planted())
    table = planted()
    assert sizes_of(table, kept(Balance(clusters=4, max_share=0.15), table)) == [15, 15, 10, 5]
    shares = np.array(SIZES) / 100
    assert answer.cut["effective_before"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), abs=1e-4)
    assert answer.cut["effective_after"] > answer.cut["effective_before"]
    assert (answer.cut["largest_before"], answer.cut["largest_after"]) == (60, 15)
    row = int(np.flatnonzero(answer.rejected)[0])
    assert answer.reasons[row].endswith("has 60 rows, 15 of them stay")


def test_temperature_shrinks_large_clusters_towards_the_mean_and_leaves_small_ones():
    table = planted()
    assert sizes_of(table, kept(Balance(clusters=4, temperature=1), table)) == list(SIZES)
    # mean 25: ceil(25 * sqrt(60 / 25)) = 39
    assert sizes_of(table, kept(Balance(clusters=4, temperature=2), table)) == [39, 25, 10, 5]
    assert sizes_of(table, kept(Balance(clusters=4, temperature=1e9), table)) == [26, 25, 10, 5]


def test_the_order_of_rows_changes_nothing():
    table = planted()
    order = np.random.default_rng(3).permutation(100)
    shuffled = {name: values[order] for name, values in table.items()}
    rule = Balance(clusters=4, max_share=0.1)
    assert kept(rule, table) == kept(rule, shuffled)
    assert kept(rule, table) != kept(Balance(clusters=4, max_share=0.1, seed=1), table)


def test_the_highest_of_a_column_stay():
    table = planted()
    stay = kept(Balance(clusters=4, max_share=0.1, by="clip.score"), table)
    for concept in range(4):
        members = np.flatnonzero(table["concept"] == concept)
        best = members[np.argsort(-table["clip.score"][members])][:10]
        assert set(table["uid"][best]) == set(table["uid"][members]) & stay


def test_a_vector_without_a_direction_fails_its_row_alone():
    table = planted()
    table["clip.image_embedding"][3] = 0
    table["clip.image_embedding"][4] = np.nan
    answer = Balance(clusters=4, max_share=1).judge(table)
    assert set(answer.failures) == {3, 4}
    assert not answer.rejected.any()


def test_few_rows_and_none():
    table = {name: values[:1] for name, values in planted().items()}
    assert not Balance(clusters=50, max_share=0.5).judge(table).rejected.any()
    assert cluster(np.zeros((0, 4), np.float16), 3, 0).shape == (0,)
    assert effective(np.array([5, 5, 0, 5])) == pytest.approx(3)


@pytest.mark.parametrize("options", [{}, {"max_share": 0.5, "temperature": 2}, {"max_share": 0}, {"temperature": 0.5}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="balance rule"):
        Balance(**options)
