"""What other tools find in a snapshot's shards: tars of bounded size, img2dataset's Parquet, wids' index, subsets."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.packing import cut_into_parts
from pipelines.readers import discover, read
from pipelines.recipe import Input, load_recipe
from pipelines.runner import Options, curate
from tests.pipelines import raw


def run(tmp_path, *overrides: str):
    url = raw.write_world(tmp_path / "raw", shards=3)
    recipe = load_recipe({**raw.RECIPE, "input": {"url": url}}, overrides)
    return curate(recipe, Options(output=str(tmp_path / "out"), engine="local", quiet=True, report=False))


def kept(snapshot) -> list[dict]:
    rows = [row for table in snapshot.tables("ledger") for row in table.to_pylist()]
    return [row for row in rows if row["verdict"] == "kept"]


def test_tars_hold_at_most_so_many_samples_each_with_its_table_beside_it(tmp_path):
    snapshot = run(tmp_path, "pack.input_shards=2", "pack.shard_samples=8")
    paths = [shard["path"] for shard in snapshot.manifest["shards"]]
    assert paths == [f"shards/{name}.tar" for name in ("000000000", "000000001", "000000002", "000001000", "000001001")]
    assert [shard["count"] for shard in snapshot.manifest["shards"]] == [8, 8, 4, 8, 2]
    for shard in snapshot.manifest["shards"]:
        table = pq.read_table(snapshot.folder.at(shard["path"].replace(".tar", ".parquet")))
        with tarfile.open(snapshot.folder.at(shard["path"])) as archive:
            names = [name for name in archive.getnames() if name.endswith(".jpg")]
        mine = [row for row in kept(snapshot) if row["output_shard"] == shard["path"]]
        assert [f"{key}.jpg" for key in table["key"].to_pylist()] == names == [f"{r['output_key']}.jpg" for r in mine]
        assert table["uid"].to_pylist() == [row["uid"] for row in mine]
        assert set(table["status"].to_pylist()) == {"success"}
        assert table["original_width"].to_pylist() == [row["decode.width"] for row in mine]
        stats = snapshot.folder.read_json(shard["path"].replace(".tar", "_stats.json"))
        assert stats["successes"] == shard["count"]


def test_tars_hold_at_most_so_many_image_bytes(tmp_path):
    snapshot = run(tmp_path, "pack.input_shards=3", "pack.shard_bytes=4000")
    sizes: dict[str, list[int]] = {}
    for row in kept(snapshot):
        sizes.setdefault(row["output_shard"], []).append(row["size_bytes"])
    assert len(sizes) > 3
    assert all(sum(mine) <= 4000 or len(mine) == 1 for mine in sizes.values())


def test_wids_finds_every_shard_and_its_samples(tmp_path):
    snapshot = run(tmp_path, "pack.shard_samples=4")
    index = snapshot.folder.read_json("shards/wids-meta.json")
    assert index["wids_version"] == 1
    found = {entry["url"]: (entry["nsamples"], entry["filesize"]) for entry in index["shardlist"]}
    expected = {}
    for path in (tmp_path / "out").glob(f"snapshots/{snapshot.id}/shards/*.tar"):
        with tarfile.open(path) as archive:
            count = sum(name.endswith(".jpg") for name in archive.getnames())
        expected[path.name] = (count, path.stat().st_size)
    assert found == expected


def test_a_snapshots_shards_are_read_back_as_they_were_written(tmp_path):
    snapshot = run(tmp_path, "pack.shard_samples=4")
    shards = discover(Input(snapshot.folder.address("shards")))
    assert all(shard.sidecar for shard in shards)
    samples = [sample for shard in shards for sample in read(shard)]
    assert [sample.error for sample in samples] == [None] * len(samples)
    assert [sample.source_uid for sample in samples] == [row["uid"] for row in kept(snapshot)]
    again = load_recipe({**raw.RECIPE, "input": {"url": snapshot.folder.address("shards")}})
    second = curate(again, Options(output=str(tmp_path / "again"), engine="local", quiet=True, report=False))
    assert {row["uid"] for row in kept(second)} == {row["uid"] for row in kept(snapshot)}


def test_bounds_do_not_change_which_rows_are_kept(tmp_path):
    first = {row["uid"] for row in kept(run(tmp_path))}
    assert {row["uid"] for row in kept(run(tmp_path, "pack.input_shards=3", "pack.shard_samples=7"))} == first


@given(st.lists(st.integers(0, 50)), st.integers(0, 5), st.integers(0, 100))
def test_parts_are_runs_within_the_bounds_and_none_could_take_its_next(sizes, most_samples, most_bytes):
    parts = cut_into_parts(sizes, most_samples, most_bytes)
    assert parts == sorted(parts)
    assert set(parts) == set(range(len(set(parts))))
    for part in set(parts):
        mine = [size for size, at in zip(sizes, parts, strict=True) if at == part]
        rest = [size for size, at in zip(sizes, parts, strict=True) if at == part + 1]
        assert not most_samples or len(mine) <= most_samples
        assert not most_bytes or sum(mine) <= most_bytes or len(mine) == 1
        full = (most_samples and len(mine) == most_samples) or (
            rest and most_bytes and sum(mine) + rest[0] > most_bytes
        )
        assert not rest or full


def test_a_subset_written_by_one_selection_is_read_as_the_next_runs_input(tmp_path, sluice):
    snapshot = run(tmp_path)
    told = sluice("select", snapshot.folder.url, "--subset", tmp_path / "uids.npy", "--json")
    assert json.loads(told.stdout)["id"] == snapshot.id
    uids = np.load(tmp_path / "uids.npy")
    assert uids.dtype == np.dtype("u8,u8")
    assert [f"{high:016x}{low:016x}" for high, low in uids.tolist()] == sorted(row["uid"] for row in kept(snapshot))
    shards = discover(Input(snapshot.folder.address("shards"), subset=str(tmp_path / "uids.npy")))
    assert sum(1 for shard in shards for _ in read(shard)) == len(uids)


@pytest.mark.parametrize("option", ["shard_samples", "shard_bytes"])
def test_a_bound_below_nothing_is_refused(option):
    with pytest.raises(ValueError, match=rf"pack.{option}"):
        load_recipe({"stages": {"decode": {}}, "pack": {option: -1}})
