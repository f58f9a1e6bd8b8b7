"""Rules on the smallest tables that show what they do."""

import numpy as np
import pytest

from stages.rules import Quantile, Threshold, TopFraction


def table(**columns):
    count = len(next(iter(columns.values())))
    names = {"uid": np.array([f"u{i}" for i in range(count)], object), "shard": np.array(["s"] * count, object)}
    return {**names, "index": np.arange(count), **columns}


def objects(*values):
    array = np.empty(len(values), object)
    array[:] = values
    return array


def test_threshold_rejects_below_and_above_and_keeps_the_bounds_themselves():
    rule = Threshold(column="x", at_least=2, at_most=4)
    assert rule.judge(table(x=np.array([1.9, 2.0, 4.0, 4.1]))).rejected.tolist() == [True, False, False, True]


def test_threshold_says_why():
    answer = Threshold(column="decode.short_side", at_least=64).judge(table(**{"decode.short_side": np.array([24])}))
    assert answer.reasons[0] == "decode.short_side 24 is below 64"
    assert (answer.value[0], answer.threshold) == (24, 64)


def test_threshold_on_a_value_that_is_no_number_fails_the_row_instead_of_rejecting_it():
    answer = Threshold(column="x", at_least=0).judge(table(x=np.array([np.nan, 1.0])))
    assert not answer.rejected.any()
    assert list(answer.failures) == [0]


def test_threshold_on_text():
    column = objects(None, "boilerplate", "url")
    assert Threshold(column="x", is_null=True).judge(table(x=column)).rejected.tolist() == [False, True, True]
    assert Threshold(column="x", one_of=("url",)).judge(table(x=column)).rejected.tolist() == [True, True, False]
    assert Threshold(column="x", equals="url").judge(table(x=column)).rejected.tolist() == [True, True, False]


def test_a_rule_that_asks_nothing_is_refused():
    with pytest.raises(ValueError, match="asks nothing"):
        Threshold(column="x")


def test_top_fraction_keeps_the_floor_of_f_times_n_and_records_the_cut():
    answer = TopFraction(column="x", fraction=0.7).judge(table(x=np.arange(10.0)))
    assert answer.rejected.tolist() == [True] * 3 + [False] * 7
    assert answer.cut == {"fraction": 0.7, "cut": 3.0, "kept": 7, "of": 10}


def test_top_fraction_breaks_ties_by_occurrence_whatever_the_order_of_rows():
    answer = TopFraction(column="x", fraction=0.5).judge(
        {
            "x": np.ones(4),
            "uid": np.array(list("dbca"), object),
            "shard": np.array(["s"] * 4, object),
            "index": np.arange(4),
        }
    )
    assert answer.rejected.tolist() == [True, False, True, False]


def test_top_fraction_fails_what_is_not_finite_and_does_not_count_it():
    answer = TopFraction(column="x", fraction=0.5).judge(table(x=np.array([np.nan, np.inf, 1.0, 2.0])))
    assert sorted(answer.failures) == [0, 1]
    assert answer.rejected.tolist() == [False, False, True, False]


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
def test_top_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction"):
        TopFraction(column="x", fraction=fraction)


def test_null_may_be_one_of_the_values_that_pass():
    column = objects(None, "en", "de")
    answer = Threshold(column="x", one_of=("en", None)).judge(table(x=column))
    assert answer.rejected.tolist() == [False, False, True]
    assert answer.reasons == {2: "x 'de' is none of en, None"}


def test_top_fraction_of_one_keeps_every_row_that_has_a_number():
    # An index of n into n sorted values is where a threshold taken by position falls over.
    answer = TopFraction(column="x", fraction=1.0).judge(table(x=np.array([0.5, 0.1, np.nan, 0.1])))
    assert not answer.rejected.any()
    assert list(answer.failures) == [2]
    assert answer.cut == {"fraction": 1.0, "cut": 0.1, "kept": 3, "of": 3}


def test_quantile_keeps_what_lies_between_and_ties_together():
    answer = Quantile(column="x", at_least=0.3, at_most=0.8).judge(table(x=np.arange(1.0, 11.0)))
    assert answer.rejected.tolist() == [True] * 2 + [False] * 6 + [True] * 2
    assert answer.cut == {"at_least": 3.0, "at_most": 8.0, "of": 10}
    assert answer.reasons[0] == "x 1 is below the 0.3 quantile (cut 3)"
    tied = Quantile(column="x", at_least=0.5).judge(table(x=np.array([1.0, 2.0, 2.0, 2.0])))
    assert tied.rejected.tolist() == [True, False, False, False]


def test_quantile_fails_values_that_are_not_finite_and_takes_an_empty_table():
    answer = Quantile(column="x", at_least=0.5).judge(table(x=np.array([np.nan, 1.0, np.inf, 3.0])))
    assert set(answer.failures) == {0, 2}
    assert answer.cut == {"at_least": 1.0, "at_most": None, "of": 2}
    assert not Quantile(column="x", at_most=0.5).judge(table(x=np.zeros(0))).rejected.any()


@pytest.mark.parametrize("options", [{}, {"at_least": 2}, {"at_most": -0.1}])
def test_quantile_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="quantile"):
        Quantile(column="x", **options)
