"""The measuring worker: models fed ahead of their computing, bytes that nobody unpickles, no torch for nothing."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

import pipelines.recipe as recipe_module
from pipelines.recipe import load_recipe
from pipelines.runner import Options, curate
from stages.decode import EncodedImage
from tests.pipelines import raw

HEAVY = ("torch", "torchvision", "ray", "transformers", "open_clip")


@pytest.fixture(autouse=True)
def probe_stages(monkeypatch):
    monkeypatch.setitem(recipe_module.STAGE_TYPES, "probe", "tests.pipelines.probe:Probe")
    monkeypatch.setitem(recipe_module.STAGE_TYPES, "prepared_probe", "tests.pipelines.probe:PreparedProbe")


def run(folder: Path, url: str, stages: dict, **engine):
    recipe = {"input": {"url": url}, "stages": {"decode": {}, **stages}, "engine": engine}
    snapshot = curate(load_recipe(recipe), Options(output=str(folder), engine="local", quiet=True, report=False))
    return [row for table in snapshot.tables("ledger") for row in table.to_pylist()], snapshot


@pytest.mark.parametrize("transport_batch", [1, 5, 200])
def test_a_model_fed_by_other_threads_gives_what_it_gives_alone(tmp_path, transport_batch):
    url = raw.write_world(tmp_path / "raw", shards=2, rows=60)
    alone, _ = run(tmp_path / "alone", url, {"probe": {"type": "probe"}})
    fed, _ = run(tmp_path / "fed", url, {"probe": {"type": "prepared_probe"}}, transport_batch=transport_batch)
    assert [(row["key"], row["probe.score"], row["probe.batch"], row["probe.error"]) for row in fed] == [
        (row["key"], row["probe.score"], row["probe.batch"], row["probe.error"]) for row in alone
    ]
    assert {row["probe.batch"] for row in fed} == {16, 65 % 16}


def test_a_model_that_breaks_ends_the_run_with_its_reason(tmp_path):
    url = raw.write_world(tmp_path / "raw", shards=1)
    with pytest.raises(ValueError, match="the model broke"):
        run(tmp_path / "out", url, {"probe": {"type": "prepared_probe", "fail_on": "all"}})


def test_pixels_of_few_rows_are_held_at_a_time(tmp_path, monkeypatch):
    """Whole batches of decoded photographs would fill the memory: a model's rows let go of theirs one by one."""
    held: weakref.WeakSet = weakref.WeakSet()
    most = [0]
    decode, release = EncodedImage.picture, EncodedImage.release

    def picture(self):
        found = decode(self)
        if found is not None:
            held.add(self)
            most[0] = max(most[0], len(held))
        return found

    def forget(self):
        held.discard(self)
        release(self)

    monkeypatch.setattr(EncodedImage, "picture", picture)
    monkeypatch.setattr(EncodedImage, "release", forget)
    url = raw.write_world(tmp_path / "raw", shards=1, rows=100)
    run(tmp_path / "out", url, {"probe": {"type": "prepared_probe"}}, transport_batch=8)
    assert 0 < most[0] <= 8


def test_members_that_would_run_code_when_unpickled_are_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    trap = pickle.dumps(Trap())
    members = raw.sample("a", raw.jpeg(raw.picture(1)), "a photo of a thing")
    members += [
        (f"a.{extension}", trap) for extension in ("pkl", "pickle", "pyd", "pth", "pt", "npy", "ten", "mp", "cls")
    ]
    members += [("b.pkl", trap), ("c.jpg", trap)]
    raw.write_tar(tmp_path / "raw" / "0.tar", members)
    rows, _ = run(tmp_path / "out", str(tmp_path / "raw"), {})
    verdicts = {row["key"]: (row["verdict"], row["reason"]) for row in rows}
    assert verdicts["a"][0] == "kept"
    assert verdicts["b"] == ("failed", "no image beside it")
    assert verdicts["c"] == ("failed", "not an image of a known format")
    assert not (tmp_path / "sprung").exists()


def test_output_shards_follow_the_input_not_batches(tmp_path):
    url = raw.write_world(tmp_path / "raw", shards=2, rows=20)
    counts = []
    for size in (1, 7, 64):
        _, snapshot = run(tmp_path / f"out{size}", url, {}, transport_batch=size)
        counts.append([(shard["path"], shard["count"], shard["digest"]) for shard in snapshot.manifest["shards"]])
    assert counts[0] == counts[1] == counts[2]
    assert [count for _, count, _ in counts[0]] == [24, 24]


def test_a_worker_of_cheap_measures_loads_no_torch(tmp_path):
    url = raw.write_world(tmp_path / "raw", shards=1)
    recipe = {
        "input": {"url": url},
        "stages": {
            "decode": {"reduced": True},
            "text": {"type": "text_quality"},
            "quick": {"type": "fast_hash"},
            "hash": {"type": "perceptual_hash"},
        },
    }
    script = (
        "import json, sys\n"
        "from pipelines.recipe import load_recipe\n"
        "from pipelines.runner import Options, curate\n"
        "curate(load_recipe(json.loads(sys.argv[1])), Options(sys.argv[2], engine='local', quiet=True, report=False))\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, json.dumps(recipe), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
