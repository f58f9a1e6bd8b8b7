"""Snapshots: what a curation run leaves behind, found again by path, opened and written.

    OUT/snapshots/<id>/manifest.json     the snapshot (written last: a folder without it is not one)
    OUT/latest                           the id of the newest snapshot of this output

The id is a digest of the schema version, the resolved recipe without resources or paths, model digests and per-file
digests of logical rows. Code version joins the manifest beside it; times, hosts and addresses stand in
provenance.json.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Folder, natural_key
from pipelines.readers.subset import is_uid
from stages.contract import digest_of

SCHEMA_VERSION = "1.0"
READABLE_MAJORS = (1,)


class SnapshotError(ValueError):
    """A path that is no snapshot, or one this version cannot read."""


@dataclass(frozen=True)
class Snapshot:
    """An opened snapshot: its folder and manifest."""

    folder: Folder
    manifest: Mapping[str, Any]

    @property
    def id(self) -> str:
        return self.manifest["id"]

    @property
    def store(self) -> Folder:
        """The output that this snapshot belongs to: its finished units lie there."""
        return Folder(self.folder.url.rpartition("/snapshots/")[0])

    def provenance(self) -> dict[str, Any]:
        return self.folder.read_json("provenance.json")

    def tables(self, kind: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The Parquet files of "ledger", "captions" or "features", one at a time, in order."""
        for path in sorted(self.manifest["files"], key=natural_key):
            if path.startswith(f"{kind}/"):
                yield pq.read_table(self.folder.open(path), columns=list(columns) if columns else None)

    def subset_uids(self) -> Iterator[str]:
        """A DataComp uid for every kept row: the one it came with where that is one, else ours."""
        for table in self.tables("ledger", ["uid", "source_uid", "verdict"]):
            for row in table.to_pylist():
                if row["verdict"] == "kept":
                    yield row["source_uid"] if is_uid(row["source_uid"]) else row["uid"]

    def sides(self) -> dict[str, str]:
        """image_id -> "train" or "held_out", for every row in a duplicate group; held-out wins."""
        sides: dict[str, str] = {}
        for table in self.tables("ledger", ["image_id", "split"]):
            for image_id, split in zip(table["image_id"].to_pylist(), table["split"].to_pylist(), strict=True):
                if split and sides.get(image_id) != "held_out":
                    sides[image_id] = split
        return sides


def open_snapshot(url: str) -> Snapshot:
    """The snapshot at `url`: its folder, or an output folder (then its latest). Raises SnapshotError."""
    folder = Folder(url)
    if not folder.exists("manifest.json") and folder.exists("latest"):
        folder = folder / f"snapshots/{folder.read('latest').decode().strip()}"
    if not folder.exists("manifest.json"):
        hint = (
            "it may be unfinished: run the same curate command again" if folder.exists() else "there is no such folder"
        )
        raise SnapshotError(f"{folder.url} is not a snapshot: it has no manifest.json ({hint})")
    manifest = folder.read_json("manifest.json")
    major = int(str(manifest.get("schema_version", "0")).partition(".")[0])
    if major not in READABLE_MAJORS:
        raise SnapshotError(
            f"{folder.url} has schema version {manifest.get('schema_version')}; this version reads "
            f"{', '.join(f'{number}.x' for number in READABLE_MAJORS)}: use a newer Sluice"
        )
    return Snapshot(folder, manifest)


def snapshot_id(recipe: Mapping[str, Any], models: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> str:
    """32 hex digits that name a snapshot's content."""
    ordered = [[section, list(value.items())] for section, value in recipe.items()]
    digests = {name: model["digest"] for name, model in models.items()}
    return digest_of(
        "snapshot", SCHEMA_VERSION, ordered, digests, {path: file["digest"] for path, file in files.items()}
    )


def _write_indexes(folder: Folder, shards: Sequence[Mapping[str, Any]]) -> None:
    """What other tools look for beside the tars: wids' index (SANA asks for it) and img2dataset's counts (DataComp)."""
    listed = [
        {"url": shard["path"].rpartition("/")[2], "nsamples": shard["count"], "filesize": shard["size_bytes"]}
        for shard in shards
    ]
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": "sluice", "shardlist": listed}
    folder.write_json("shards/wids-meta.json", index)
    for shard in shards:
        counts = {"count": shard["count"], "successes": shard["count"], "status_dict": {"success": shard["count"]}}
        failures = {"failed_to_download": 0, "failed_to_resize": 0}
        folder.write_json(f"{shard['path'].removesuffix('.tar')}_stats.json", {**counts, **failures})


def write_snapshot(
    store: Folder, manifest: dict[str, Any], provenance: Mapping[str, Any], packed: Sequence[Mapping[str, Any]]
) -> Snapshot:
    """Put the packed files of every group under the snapshot's own names, and its manifest last."""
    files: dict[str, dict[str, Any]] = {}
    shards: list[dict[str, Any]] = []
    places: dict[str, str] = {}
    for group in sorted(packed, key=lambda item: item["group"]):
        for path, file in group["files"].items():
            files[path] = {"digest": file["digest"], "rows": file["rows"]}
            places[path] = file["place"]
        for packed_shard in group["shards"]:
            shard = dict(packed_shard)
            places[shard["path"]] = shard.pop("place")
            shards.append(shard)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": "snapshot",
        "id": snapshot_id(
            manifest["recipe"], manifest["models"], {**files, **{shard["path"]: shard for shard in shards}}
        ),
        **manifest,
        "files": files,
        "shards": shards,
    }
    folder = store / f"snapshots/{manifest['id']}"
    if not folder.exists("manifest.json"):
        for path, place in places.items():
            store.link(place, f"snapshots/{manifest['id']}/{path}")
        _write_indexes(folder, shards)
        folder.write_json("provenance.json", {**provenance, "python": sys.version.split()[0]})
        folder.write_json("manifest.json", manifest)
    store.write("latest", manifest["id"] + "\n")
    return open_snapshot(folder.url)
