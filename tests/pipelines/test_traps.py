"""Traps that other curation systems are known to fall into, each with the test that keeps this one out.

A table, and a check that every test it names is there: a trap whose test was renamed or lost is found at once.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

# What goes wrong elsewhere: the tests that hold here.
TRAPS = {
    "a worker's death makes deduplication lose rows": [
        "pipelines/test_runner.py::test_ray_gives_the_snapshot_of_one_process",
    ],
    "a resumed run forgets rejected rows and scores them again": [
        "pipelines/test_runner.py::test_the_same_command_again_measures_nothing",
    ],
    "images are encoded again on the way out": [
        "pipelines/test_runner.py::test_kept_samples_keep_their_bytes_and_read_as_a_webdataset",
    ],
    "tars get the size that blocks happen to have": [
        "pipelines/test_packing.py::test_tars_hold_at_most_so_many_samples_each_with_its_table_beside_it",
    ],
    "the same run writes other bytes": [
        "pipelines/test_runner.py::test_a_killed_driver_started_again_ends_byte_identical",
    ],
    "dots in a key merge samples": [
        "pipelines/test_readers.py::test_dots_in_names_do_not_merge_samples",
    ],
    "one corrupt member or a tar that breaks off ends the job": [
        "pipelines/test_hostile.py::test_each_trick_leaves_its_rows_and_their_reasons",
        "pipelines/test_readers.py::test_a_tar_that_breaks_off_says_so_wherever_it_breaks",
    ],
    "members are unpickled": [
        "pipelines/test_hostile.py::test_nothing_is_executed_or_written_outside_the_output",
    ],
    "captions, keys and metadata are lost on the way": [
        "pipelines/test_readers.py::test_columns_of_known_datasets_are_understood",
        "pipelines/test_packing.py::test_a_snapshots_shards_are_read_back_as_they_were_written",
    ],
    "rows vanish without a reason": [
        "pipelines/test_hostile.py::test_at_least_thirty_tricks_and_no_row_without_a_verdict",
        "pipelines/test_readers.py::test_img2datasets_failures_are_rows_although_only_its_parquet_has_them",
    ],
    "a mark says finished although the content is another": [
        "pipelines/test_changes.py::test_one_changed_input_shard_is_measured_alone",
        "pipelines/test_readers.py::test_tables_name_images_below_the_folders_they_may_name",
    ],
    "one changed option does everything again": [
        "pipelines/test_changes.py::test_a_threshold_behind_all_stages_is_judged_again_and_measures_nothing",
        "pipelines/test_changes.py::test_a_stage_redoes_itself_and_what_looks_behind_it",
    ],
    "failed rows cannot be tried again alone": [
        "pipelines/test_changes.py::test_failed_rows_alone_are_taken_up_again",
    ],
    "orientation, CMYK, alpha, 16 bits, moving pictures and bombs surprise the decoder": [
        "pipelines/test_hostile.py::test_each_trick_leaves_its_rows_and_their_reasons",
        "pipelines/test_hostile.py::test_memory_stays_bounded",
    ],
    "half a file stands in an object store": [
        "cluster/test_object_store.py::test_a_write_that_breaks_off_leaves_no_object",
        "cluster/test_object_store.py::test_a_manifest_is_the_last_object_written",
    ],
}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_has_its_test(trap):
    for test in TRAPS[trap]:
        path, _, name = test.partition("::")
        module = ast.parse((TESTS / path).read_text())
        assert name in {node.name for node in module.body if isinstance(node, ast.FunctionDef)}, test
