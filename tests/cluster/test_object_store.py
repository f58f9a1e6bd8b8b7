"""The object-store path against a server that speaks S3: shards read from it, a whole store written to it."""

from __future__ import annotations

import json
import threading
import time

import pyarrow.fs as pafs
import pytest

from cluster import storage
from cluster.storage import Folder, LeaseHeldError, lease
from pipelines.readers import InputShard, discover, read, shard_digest
from pipelines.recipe import Input, load_recipe
from pipelines.runner import Options, curate
from pipelines.snapshot import open_snapshot
from tests.pipelines import raw


@pytest.fixture(scope="module")
def server():
    """The address of an S3 server on this machine."""
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server, monkeypatch) -> str:
    """A fresh bucket's address, as a user would write it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"b{time.time_ns()}"
    filesystem = pafs.S3FileSystem(endpoint_override=server, scheme="http", allow_bucket_creation=True)
    filesystem.create_dir(name)
    return f"s3://{name}"


def put(bucket: str, local, path: str) -> None:
    Folder(bucket).write(path, local.read_bytes())


def run(url: str, output: str):
    recipe = load_recipe({**raw.RECIPE, "input": {"url": url}})
    return curate(recipe, Options(output=output, engine="local", quiet=True, report=False))


def test_a_store_on_s3_is_the_store_on_a_disk(bucket, tmp_path):
    local = raw.write_world(tmp_path / "raw", shards=2)
    for name in ("00000.tar", "00001.tar"):
        put(bucket, tmp_path / "raw" / name, f"raw/{name}")
    here = run(local, str(tmp_path / "out"))
    there = run(f"{bucket}/raw/{{00000..00001}}.tar", f"{bucket}/out")
    assert there.id == here.id
    for name in here.manifest["files"]:
        assert there.folder.read(name) == here.folder.read(name)
    for shard in here.manifest["shards"]:
        assert there.folder.read(shard["path"]) == here.folder.read(shard["path"])
    assert open_snapshot(f"{bucket}/out").id == here.id
    assert not Folder(f"{bucket}/out").exists("lease.json")
    # Again: everything is found, nothing is measured or written anew but the pointer to the snapshot.
    before = {entry.path: entry.mtime_ns for entry in Folder(f"{bucket}/out").files("units")}
    assert run(f"{bucket}/raw", f"{bucket}/out").id == here.id
    after = {entry.path: entry.mtime_ns for entry in Folder(f"{bucket}/out").files("units")}
    assert {path for path in before if path.endswith(".parquet")} <= set(after)
    assert all(after[path] == before[path] for path in before if path in after and "units/decode" in path)


def test_patterns_folders_tables_and_digests_on_s3(bucket, tmp_path):
    picture = raw.jpeg(raw.picture(1))
    store = Folder(bucket)
    store.write("images/a.jpg", picture)
    store.write("images/a.txt", "words")
    store.write("list.tsv", f"url\tcaption\n{bucket}/images/a.jpg\tone\ns3://elsewhere/a.jpg\ttwo\n")
    raw.write_tar(tmp_path / "2.tar", raw.sample("x", picture, "words"))
    for name in ("2.tar", "10.tar"):
        put(bucket, tmp_path / "2.tar", f"shards/{name}")
    assert [shard.name for shard in discover(Input(f"{bucket}/shards/*.tar"))] == ["2.tar", "10.tar"]
    (folder,) = discover(Input(f"{bucket}/images"))
    assert [(sample.data, sample.caption) for sample in read(folder)] == [(picture, "words")]
    (table,) = discover(Input(f"{bucket}/list.tsv", images=(f"{bucket}/images",)))
    found = list(read(table))
    assert [(sample.data, sample.error) for sample in found] == [
        (picture, None),
        (None, "outside the folders that input.images allows"),
    ]
    before = shard_digest(table)
    store.write("images/a.jpg", raw.jpeg(raw.picture(2)))
    assert shard_digest(table) != before
    local = InputShard("2.tar", str(tmp_path / "2.tar"), "webdataset")
    assert shard_digest(local) == shard_digest(discover(Input(f"{bucket}/shards/2.tar"))[0])


def test_of_two_writers_on_one_bucket_one_is_refused(bucket):
    folder = Folder(f"{bucket}/out")
    with lease(folder, "the first"):
        with pytest.raises(LeaseHeldError, match="the first"), lease(folder, "the second"):
            pass
        assert folder.read_json("lease.json")["what"] == "the first"
    with lease(folder, "the second"):
        assert folder.read_json("lease.json")["what"] == "the second"


def test_a_writer_that_lost_its_lease_says_so_and_leaves_the_others_alone(bucket, monkeypatch):
    monkeypatch.setattr(storage, "LEASE_BEAT_S", 0.05)
    folder = Folder(f"{bucket}/out")
    other = {"token": "another", "what": "another", "host": "elsewhere", "pid": 1, "beat": time.time()}

    def write() -> None:
        with lease(folder, "the first"):
            folder.write_json("lease.json", other)
            time.sleep(0.5)

    with pytest.raises(LeaseHeldError, match="taken by another process meanwhile"):
        write()
    assert folder.read_json("lease.json") == other


def test_writers_that_come_at_the_same_time_never_both_hold_a_bucket(bucket):
    folder = Folder(f"{bucket}/out")
    holding, most, refused = [0], [0], []

    def write() -> None:
        try:
            with lease(folder, "a writer"):
                holding[0] += 1
                most[0] = max(most[0], holding[0])
                time.sleep(0.5)
                holding[0] -= 1
        except LeaseHeldError as problem:
            refused.append(problem)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert len(refused) >= 1


def test_a_write_that_breaks_off_leaves_no_object(bucket):
    def fill(stream) -> None:
        stream.write(b"half")
        raise RuntimeError("stop")

    folder = Folder(bucket)
    with pytest.raises(RuntimeError, match="stop"):
        folder.write_with("half.json", fill)
    assert not folder.exists("half.json")


def test_a_manifest_is_the_last_object_written(bucket, tmp_path, monkeypatch):
    written: list[str] = []
    write_with = Folder.write_with

    def note(self, path, fill):
        written.append(f"{self.url}/{path}")
        return write_with(self, path, fill)

    monkeypatch.setattr(Folder, "write_with", note)
    raw.write_world(tmp_path / "raw", shards=1)
    snapshot = run(str(tmp_path / "raw"), f"{bucket}/out")
    mine = [path for path in written if f"/snapshots/{snapshot.id}/" in path]
    assert mine[-1].endswith("/manifest.json")
    assert json.loads(Folder(snapshot.folder.url).read("manifest.json"))["id"] == snapshot.id
