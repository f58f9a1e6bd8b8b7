"""Hostile inputs: the run ends well, each row has its reason, memory stays bounded, nothing is executed or written
outside the output.

All cases go through one run of the command, in a process of its own, so that its memory can be taken.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipelines.readers as readers_module
from pipelines.readers import InputShard, read
from pipelines.snapshot import open_snapshot
from stages.decode import EncodedImage, PixelBudget
from tests.pipelines import raw
from tests.pipelines.hostile import CASES, HTML, picture

RECIPE = """
stages: {decode: {}, text: {type: text_quality}, hash: {type: perceptual_hash}}
rules: {caption: {column: decode.width, at_least: 1}}
"""
# The command, which at its end says the most memory it ever held (what rusage says counts the parent's before exec).
PROGRAM = """
import atexit
atexit.register(lambda: print(open("/proc/self/status").read()))
from pipelines.cli import main
main()
"""
MOST_MEMORY_BYTES = 1_000 << 20


def everything_below(folder: Path) -> set[str]:
    return {os.path.join(where, name) for where, folders, files in os.walk(folder) for name in (*folders, *files)}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """Every case curated in one run; rows by case, and what the run left behind."""
    root = tmp_path_factory.mktemp("hostile")
    packed = root / "packed"
    packed.mkdir()
    (root / "secret.jpg").write_bytes(picture("secret"))
    (packed / "listed.jpg").write_bytes(picture("listed"))
    (packed / "link.jpg").symlink_to(root / "secret.jpg")
    for name, case in CASES.items():
        case.build(packed / f"{name}{case.suffix}")
    (root / "recipe.yaml").write_text(RECIPE)
    (root / "work").mkdir()
    listed = [f"{packed}/*{suffix}" for suffix in (".tar", ".tar.gz", ".tgz", ".parquet", ".csv", ".tsv")]
    inputs = [argument for url in (*listed, f"{packed}/odd.folder") for argument in ("--input", url)]
    command = [sys.executable, "-c", PROGRAM, "curate", str(root / "recipe.yaml")]
    command += ["--output", str(root / "out"), "--local", *inputs]
    before = everything_below(root)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "HOME": str(root / "home")}
    done = subprocess.run(command, cwd=root / "work", env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    memory = int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) * 1024
    new = {path for path in everything_below(root) - before if not path.startswith(f"{root}/out")}
    snapshot = open_snapshot(str(root / "out"))
    digests = {item["digest"]: item["name"].partition("#")[0] for item in snapshot.provenance()["inputs"]}
    rows: dict[str, list[dict]] = {}
    for table in snapshot.tables("ledger"):
        for row in table.to_pylist():
            rows.setdefault(digests[row["shard"]], []).append(row)
    captions = {
        row["uid"]: row["text"]
        for table in snapshot.tables("captions")
        for row in table.to_pylist()
        if row["source"] == "original"
    }
    return SimpleNamespace(
        rows=rows, captions=captions, new=new, memory=memory, snapshot=snapshot, work=root / "work", told=done.stdout
    )


@pytest.mark.parametrize("name", CASES)
def test_each_trick_leaves_its_rows_and_their_reasons(world, name):
    case = CASES[name]
    rows = world.rows[f"{name}{case.suffix}"]
    found = {row["member"]: row for row in rows} | {f"#{row['key']}": row for row in rows}
    for member, (verdict, reason) in case.rows.items():
        row = found[member]
        assert (row["verdict"], member) == (verdict, member), row["reason"]
        assert reason is None or re.search(reason, row["reason"]), row["reason"]
    for member, caption in case.captions.items():
        assert world.captions.get(found[member]["uid"]) == caption


def test_at_least_thirty_tricks_and_no_row_without_a_verdict(world):
    assert len(CASES) >= 30
    rows = [row for mine in world.rows.values() for row in mine]
    assert all(row["reason"] for row in rows if row["verdict"] != "kept")
    funnel = world.snapshot.manifest["funnel"]
    assert len(rows) == funnel["rows_in"] == funnel["kept"] + funnel["rejected"] + funnel["failed"]


def test_two_pictures_of_one_name_are_two_rows_with_captions_of_their_own(world):
    rows = [row for row in world.rows["duplicate_keys.tar"] if row["member"] == "a.jpg"]
    assert [world.captions[row["uid"]] for row in rows] == ["the first", "the second"]


def test_nothing_is_executed_or_written_outside_the_output(world):
    assert world.new == set()
    assert not list(world.work.iterdir())
    names = [
        name for shard in world.snapshot.manifest["shards"] for name in _names(world.snapshot.folder, shard["path"])
    ]
    assert names
    assert all(re.fullmatch(r"\d+\.[a-z0-9]+", name) for name in names)


def _names(folder, path: str) -> list[str]:
    with folder.open(path) as stream, tarfile.open(fileobj=stream) as archive:
        return archive.getnames()


def test_memory_stays_bounded(world):
    assert world.memory < MOST_MEMORY_BYTES


def test_the_page_shows_hostile_words_as_words(world):
    page = world.snapshot.folder.read("report.html").decode()
    assert HTML not in page
    assert "x<b>" not in page
    assert "\x1b" not in page


# --- bounds that would take gigabytes to reach -----------------------------------------------------------------------


def test_a_shard_of_too_many_members_ends_with_a_row_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(readers_module, "MAX_SHARD_SAMPLES", 10)
    path = raw.write_tar(tmp_path / "0.tar", [(f"{number}.jpg", b"") for number in range(50)])
    found = list(read(InputShard("0", str(path), "webdataset")))
    assert len(found) == 11
    assert found[-1].error == "more than 10 samples in one shard: the rest is not read"


def test_pictures_of_one_batch_keep_no_more_pixels_than_there_is_room_for():
    budget = PixelBudget(3000)
    images = [EncodedImage(raw.jpeg(raw.picture(seed, (40, 30))), budget=budget) for seed in range(4)]
    assert [image.picture().size for image in images] == [(40, 30)] * 4
    assert [image.picture() is image.picture() for image in images] == [True, True, False, False]
    for image in images:
        image.release()
    assert budget.left == 3000


# --- whatever else ---------------------------------------------------------------------------------------------------

WHOLE = io.BytesIO()
with tarfile.open(fileobj=WHOLE, mode="w", format=tarfile.PAX_FORMAT) as _archive:
    for _name, _data in [*raw.sample("a", raw.jpeg(raw.picture(1)), "one", id=1), ("ü" * 60 + ".jpg", b"\xff\xd8\xff")]:
        _entry = tarfile.TarInfo(_name)
        _entry.size = len(_data)
        _archive.addfile(_entry, io.BytesIO(_data))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=4096),
        st.lists(st.tuples(st.integers(0, len(WHOLE.getvalue()) - 1), st.integers(0, 255)), max_size=40),
        st.integers(0, len(WHOLE.getvalue())),
    )
)
def test_any_bytes_at_all_are_samples_or_reasons(tmp_path, change):
    """Random bytes, a good tar with bytes overwritten, a good tar cut off anywhere."""
    data = bytearray(WHOLE.getvalue())
    if isinstance(change, bytes):
        data = bytearray(change)
    elif isinstance(change, int):
        data = data[:change]
    else:
        for place, value in change:
            data[place] = value
    path = tmp_path / "fuzz.tar"
    path.write_bytes(data)
    found = list(read(InputShard("fuzz", str(path), "webdataset")))
    assert found or data[:512] == bytes(512)
    for sample in found:
        assert (sample.data is None) <= (sample.error is not None)
        for text in (sample.key, sample.member, sample.caption or "", sample.error or ""):
            text.encode()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=600), st.sampled_from(["csv", "tsv", "parquet"]))
def test_any_table_at_all_is_rows_or_a_reason(tmp_path, data, kind):
    path = tmp_path / f"fuzz.{kind}"
    path.write_bytes(b"file_name,caption\n" + data if kind == "csv" else b"url\tcaption\n" + data)
    for sample in read(InputShard("fuzz", str(path), kind)):
        assert sample.error
        (sample.key + sample.error + (sample.caption or "")).encode()
