"""Packing: the ledger, captions, features and tars of one run of input shards, deterministic to the byte.

An output shard covers a fixed run of input shards, so one changed verdict rewrites one tar; where a recipe bounds the
samples or bytes of a tar, the run is cut into several. Beside each tar lies its Parquet, as img2dataset has it. Kept
samples keep their original bytes; nothing is re-encoded. Every file is committed under a name that says what went into
it, so finished files are found again and never made twice.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pat

from cluster.storage import Folder
from pipelines.measure import arrow_type, write_table
from pipelines.readers import InputShard, read
from stages.contract import Column, digest_of

PACKING_VERSION = 2

# Columns of the ledger before those that stages measured.
LEDGER_READER_COLUMNS = (
    "uid",
    "image_id",
    "dataset",
    "shard",
    "index",
    "key",
    "member",
    "source_uid",
    "url",
    "size_bytes",
)
CAPTIONS_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("caption_id", pa.string()),
        ("source", pa.string()),
        ("model", pa.string()),
        ("revision", pa.string()),
        ("text", pa.string()),
        ("token_count", pa.int32()),
        ("clip_score", pa.float32()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("captioner", pa.string()),
        ("prompt", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
    ]
)


# What img2dataset writes beside a tar, and our own ids.
METADATA_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "status", "error_message", "url", "caption")),
        *((name, pa.int32()) for name in ("width", "height", "original_width", "original_height")),
        *((name, pa.string()) for name in ("exif", "sha256", "uid", "image_id", "source_uid", "dataset", "split")),
    ]
)


def output_key(group: int, position: int) -> str:
    """img2dataset's key of a sample: its shard's number, then its place, in digits alone (dots merge samples)."""
    return f"{group:06d}{position:06d}"


def output_name(group: int, part: int | None) -> str:
    """A tar's path: the number of its run of input shards, and of its part where runs are cut."""
    return f"shards/{group:06d}.tar" if part is None else f"shards/{group:06d}{part:03d}.tar"


def cut_into_parts(sizes: Sequence[int], most_samples: int, most_bytes: int) -> list[int]:
    """The part, from 0, of each sample in order: at most so many samples and image bytes each (0: no bound)."""
    parts: list[int] = []
    part = samples = held = 0
    for size in sizes:
        if samples and ((most_samples and samples == most_samples) or (most_bytes and held + size > most_bytes)):
            part, samples, held = part + 1, 0, 0
        parts.append(part)
        samples, held = samples + 1, held + size
    return parts


class PackWorker:
    """Packs one group of input shards a task.

    Config: store, columns, clip and caption_scores (the stages with scores of captions and of alternatives, or null),
    guards (rules whose dropped rows leave no features), shard_samples, shard_bytes (bounds of a tar, or 0), captioners
    (as `captioners` describes them).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.store = Folder(config["store"])
        self.columns: list[dict[str, Any]] = config["columns"]
        self.clip: str | None = config["clip"]
        self.caption_scores: str | None = config.get("caption_scores")
        self.guards = frozenset(config.get("guards", ()))
        self.bounds: tuple[int, int] = (config["shard_samples"], config["shard_bytes"])
        self.captioners: list[dict[str, Any]] = config["captioners"]

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """Make what is missing of the group's files; returns their logical digests, counts and places."""
        tables = [self._shard_table(shard) for shard in task["shards"]]
        table = pa.concat_tables(tables)
        group = task["group"]
        chosen = [row for row, verdict in enumerate(table["verdict"].to_pylist()) if verdict == "kept"]
        parts = cut_into_parts(table["size_bytes"].take(pa.array(chosen, pa.int64())).to_pylist(), *self.bounds)
        keys: list[str | None] = [None] * table.num_rows
        names: list[str | None] = [None] * table.num_rows
        for position, (row, part) in enumerate(zip(chosen, parts, strict=True)):
            keys[row] = output_key(group, position)
            names[row] = output_name(group, part if any(self.bounds) else None)
        table = table.append_column("output_shard", pa.array(names, pa.string()))
        table = table.append_column("output_key", pa.array(keys, pa.string()))
        files = {f"ledger/{group:06d}.parquet": self._commit("ledger", self._ledger(table))}
        files[f"captions/{group:06d}.parquet"] = self._commit("captions", self._captions(table))
        if any(column["feature"] for column in self.columns):
            files[f"features/{group:06d}.parquet"] = self._commit("features", self._features(table))
        shards = []
        for name in dict.fromkeys(name for name in names if name):
            rows = [row for row in chosen if names[row] == name]
            files[name.replace(".tar", ".parquet")] = self._commit("metadata", _metadata(table, rows))
            shards.append(self._tar(task, table, name, rows))
        return {"group": group, "files": files, "shards": shards}

    def _shard_table(self, shard: dict[str, Any]) -> pa.Table:
        """Rows, verdicts and every measured column of one input shard."""
        rows = pq.read_table(self.store.open(shard["rows"]))
        table = rows
        for name, value in (("shard", shard["digest"]), ("dataset", shard["dataset"] or None)):
            table = table.append_column(name, pa.array([value] * rows.num_rows, pa.string()))
        verdicts = pq.read_table(self.store.open(shard["verdicts"]))
        for name in verdicts.column_names:
            table = table.append_column(name, verdicts[name])
        for stage, path in shard["units"].items():
            unit = pq.read_table(self.store.open(path))
            for name in unit.column_names:
                table = table.append_column(f"{stage}.{name}", unit[name])
        return table

    def _ledger(self, table: pa.Table) -> pa.Table:
        verdict = ("verdict", "stage", "rule", "reason", "value", "threshold", "failed_rules", "keeper_uid", "distance")
        measured = [column["name"] for column in self.columns if not (column["feature"] or column["captions"])]
        return table.select(
            [*LEDGER_READER_COLUMNS, *verdict, "split", "output_shard", "output_key", *measured]
        ).combine_chunks()

    def _captions(self, table: pa.Table) -> pa.Table:
        rows: list[dict[str, Any]] = []
        names = ("uid", "image_id", "caption", "alternatives")
        scored = self.clip is not None
        scores = table[f"{self.clip}.score"].to_pylist() if scored else [None] * table.num_rows
        tokens = table[f"{self.clip}.text_tokens"].to_pylist() if scored else [None] * table.num_rows
        alternatives = self._alternative_scores(table)
        synthetic = [(captioner, self._said(table, captioner)) for captioner in self.captioners]
        for place, row in enumerate(table.select(list(names)).to_pylist()):
            original = (
                [(row["caption"], "original", tokens[place], scores[place])] if row["caption"] is not None else []
            )
            more = row["alternatives"] or []
            others = [(text, "alternative", *known) for text, known in zip(more, alternatives[place], strict=True)]
            for ordinal, (text, source, token_count, score) in enumerate([*original, *others]):
                rows.append(
                    {
                        "uid": row["uid"],
                        "caption_id": digest_of("caption", row["image_id"], source, None, None, text, ordinal),
                        "source": source,
                        "text": text,
                        "token_count": token_count,
                        "clip_score": score,
                        "status": "ok" if text.strip() else "empty",
                    }
                )
            rows += (caption for said in synthetic for caption in self._synthetic(*said, place, row))
        return pa.Table.from_pylist(rows, schema=CAPTIONS_SCHEMA)

    def _alternative_scores(self, table: pa.Table) -> list[list[tuple[int | None, float | None]]]:
        """(tokens, CLIP score) of every alternative caption of every row; None where a caption was not scored."""
        counts = [len(more or []) for more in table["alternatives"].to_pylist()]
        if self.caption_scores is None:
            return [[(None, None)] * count for count in counts]
        tokens = table[f"{self.caption_scores}.text_tokens"].to_pylist()
        scores = table[f"{self.caption_scores}.scores"].to_pylist()
        return [
            list(zip(mine, score, strict=True)) if score is not None else [(None, None)] * count
            for count, mine, score in zip(counts, tokens, scores, strict=True)
        ]

    def _said(self, table: pa.Table, captioner: dict[str, Any]) -> dict[str, list[Any]]:
        """A captioner's columns and its captions' scores, row by row."""
        said = {name: table[f"{captioner['stage']}.{name}"].to_pylist() for name in captioner["columns"]}
        for name in ("scores", "tokens"):
            column = f"{captioner['score']}.{name}"
            said[name] = table[column].to_pylist() if captioner["score"] else [None] * table.num_rows
        return said

    def _synthetic(
        self, captioner: dict[str, Any], said: dict[str, list[Any]], place: int, row: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """What a captioner said about one row: a caption each, whatever its status; none where it was not asked."""
        scores, tokens = said["scores"][place], said["tokens"][place]
        for ordinal, text in enumerate(said["texts"][place] or ()):
            who = [captioner["model"], captioner["revision"]]
            asked = [said["prompts"][place][ordinal], captioner["sampling"], ordinal]
            yield {
                "uid": row["uid"],
                "caption_id": digest_of("caption", row["image_id"], "synthetic", who, asked),
                "source": "synthetic",
                "model": captioner["model"],
                "revision": captioner["revision"],
                "text": text,
                "token_count": tokens[ordinal] if tokens else None,
                "clip_score": scores[ordinal] if scores else None,
                "status": said["statuses"][place][ordinal],
                "reason": said["reasons"][place][ordinal] or None,
                "captioner": captioner["stage"],
                "prompt": said["prompts"][place][ordinal],
                "prompt_tokens": said["prompt_tokens"][place][ordinal],
                "completion_tokens": said["completion_tokens"][place][ordinal],
            }

    def _features(self, table: pa.Table) -> pa.Table:
        """Feature columns of every row; null where a rule that guards has dropped the row: nothing of it is cached."""
        names = [column["name"] for column in self.columns if column["feature"]]
        features = table.select(["uid", "shard", "index", *names]).combine_chunks()
        if self.guards:
            failed = table["failed_rules"].to_pylist()
            held = [row if self.guards.isdisjoint(rules) else None for row, rules in enumerate(failed)]
            for name in names:
                place = features.column_names.index(name)
                features = features.set_column(place, name, features[name].take(pa.array(held, pa.int64())))
        return features

    def _commit(self, kind: str, table: pa.Table) -> dict[str, Any]:
        digest = logical_digest(table)
        place = f"units/{kind}/{digest[:32]}.parquet"
        if not self.store.exists(place):
            write_table(self.store, place, table)
        return {"digest": digest, "rows": table.num_rows, "place": place}

    def _tar(self, task: dict[str, Any], table: pa.Table, name: str, chosen: Sequence[int]) -> dict[str, Any]:
        """The tar of the chosen rows, known by what is in it; its record is written after it and says it is whole."""
        picked = table.select(["uid", "output_key", "split", "dataset", "shard", "index"]).take(pa.array(chosen))
        content = digest_of("tar", PACKING_VERSION, picked.to_pylist())
        place, record_place = f"units/tars/{content}.tar", f"units/tars/{content}.json"
        if not self.store.exists(record_place):
            digest = _DigestingWriter()
            self.store.write_with(place, lambda stream: self._fill_tar(digest.onto(stream), task, table, set(chosen)))
            self.store.write_json(record_place, {"digest": digest.hexdigest(), "size_bytes": digest.size_bytes})
        return {
            "path": name,
            **self.store.read_json(record_place),
            "count": len(chosen),
            "held_out": sum(split == "held_out" for split in picked["split"].to_pylist()),
            "inputs": [shard["digest"] for shard in task["shards"]],
            "ledger": f"ledger/{task['group']:06d}.parquet",
            "place": place,
        }

    def _fill_tar(self, stream: IO[bytes], task: dict[str, Any], table: pa.Table, chosen: Set[int]) -> None:
        names = [name for name in table.column_names if "." not in name]
        rows = table.select([*names, *_sizes(table)])
        first = 0
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as archive:
            for shard in task["shards"]:
                mine = sorted(row for row in chosen if first <= row < first + shard["count"])
                # Of a shard whose rows go into several tars, only what lies up to the last one of this tar is read.
                samples = read(InputShard.from_json(shard["shard"])) if mine else iter(())
                for row, sample in enumerate(itertools.islice(samples, mine[-1] - first + 1 if mine else 0), first):
                    if row in chosen:
                        for member, data in _members(rows.slice(row, 1).to_pylist()[0], sample.data or b""):
                            _add(archive, member, data)
                first += shard["count"]


def _sizes(table: pa.Table) -> list[str]:
    return [name for name in ("decode.width", "decode.height") if name in table.column_names]


def _metadata(table: pa.Table, chosen: Sequence[int]) -> pa.Table:
    """img2dataset's table about the samples of one tar."""
    names = ["output_key", "url", "caption", "sha256", "uid", "image_id", "source_uid", "dataset", "split", "metadata"]
    rows = []
    for row in table.select([*names, *_sizes(table)]).take(pa.array(chosen)).to_pylist():
        known = json.loads(row["metadata"] or "{}")
        size = {"width": row.get("decode.width"), "height": row.get("decode.height")}
        rows.append(
            {
                **row,
                **size,
                **{f"original_{name}": value for name, value in size.items()},
                "key": row["output_key"],
                "status": "success",
                "exif": known["exif"] if isinstance(known.get("exif"), str) else None,
            }
        )
    return pa.Table.from_pylist(rows, schema=METADATA_SCHEMA)


def _members(row: dict[str, Any], data: bytes) -> Iterator[tuple[str, bytes]]:
    """The members of one kept sample in img2dataset's layout."""
    key = row["output_key"]
    caption = row["caption"] or ""
    metadata = {
        "uid": row["uid"],
        "image_id": row["image_id"],
        "key": key,
        "caption": caption,
        "alternatives": row["alternatives"] or [],
        "url": row["url"],
        "source_uid": row["source_uid"],
        "source_dataset": row["dataset"],
        "source_metadata": json.loads(row["metadata"] or "{}"),
        "source_shard": row["shard"],
        "source_index": row["index"],
        "source_key": row["key"],
        "width": row.get("decode.width"),
        "height": row.get("decode.height"),
        "sha256": row["sha256"],
        "split": row["split"],
        "status": "success",
        "error_message": None,
    }
    if data:
        yield f"{key}.{row['ext'] or 'bin'}", data
    yield f"{key}.txt", caption.encode("utf-8", "replace")
    yield f"{key}.json", json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace")


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """One member with everything fixed that a clock, a user or a machine would vary."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.mode = len(data), 0, 0o644
    archive.addfile(entry, io.BytesIO(data))


class _DigestingWriter:
    """A stream that passes bytes on and digests them on the way."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._stream: IO[bytes] | None = None
        self.size_bytes = 0

    def onto(self, stream: IO[bytes]) -> Any:
        self._stream = stream
        return self

    def write(self, data: bytes) -> int:
        assert self._stream is not None
        self._stream.write(data)
        self._digest.update(data)
        self.size_bytes += len(data)
        return len(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def logical_digest(table: pa.Table) -> str:
    """sha256 over a table's rows as values: the same whatever the file's encoding, compression or chunks.

    Each column is taken as its name, its type, which rows are null, and its values with nulls as zero or nothing.
    """
    total = hashlib.sha256()
    for name in table.column_names:
        column = table[name].combine_chunks()
        total.update(f"{name}\0{column.type}\0{len(column)}\0".encode())
        _digest_array(total, column)
    return total.hexdigest()


def _digest_array(total: Any, column: pa.Array) -> None:
    kind = column.type
    total.update(np.packbits(column.is_null().to_numpy(zero_copy_only=False)).tobytes())
    if pat.is_fixed_size_list(kind):
        flat = column.drop_null().flatten()
        total.update(np.ascontiguousarray(flat.to_numpy(zero_copy_only=False)).tobytes())
    elif pat.is_list(kind):
        total.update(json.dumps(column.to_pylist(), ensure_ascii=False).encode("utf-8", "surrogatepass"))
    elif pat.is_floating(kind) or pat.is_integer(kind) or pat.is_boolean(kind):
        present = column.drop_null()
        total.update(np.ascontiguousarray(present.to_numpy(zero_copy_only=False)).tobytes())
    else:
        for value in column.drop_null().to_pylist():
            data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
            total.update(len(data).to_bytes(8, "little") + data)


def ledger_columns(
    stages: Sequence[tuple[str, Any]], model_digests: dict[str, str], rules: Sequence[tuple[str, Any]] = ()
) -> list[dict[str, Any]]:
    """The manifest's description of every column measured by a stage or recorded by a rule: `<stage>.<name>`, type,
    unit, scale, model."""
    described = []
    for name, stage in stages:
        described += [
            {**_described(name, column, model_digests.get(name)), **_model_named(stage)} for column in stage.adds
        ]
        described.append(_described(name, Column("error", "string"), None))
    for name, rule in rules:
        if rule.records:
            described.append(_described(name, rule.records, None))
    return described


def _model_named(stage: Any) -> dict[str, str]:
    """The model behind a stage's numbers, as its recipe names it: a score says nothing without it."""
    options = stage.options()
    named = {"model": options.get("model", options.get("head")), "pretrained": options.get("pretrained")}
    return {name: value for name, value in named.items() if value}


def _described(name: str, column: Column, model_digest: str | None) -> dict[str, Any]:
    return {
        "name": f"{name}.{column.name}",
        "type": str(arrow_type(column.type)),
        "unit": column.unit,
        "scale": column.scale,
        "stage": name,
        "model_digest": model_digest,
        "feature": column.feature,
        "captions": column.captions,
    }


def captioners(stages: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each captioner of a recipe: its stage, columns, model, revision and sampling, and the stage that scores it."""
    scorers = {stage.of: name for name, stage in stages.items() if stage.type == "synthetic_score"}
    described = []
    for name, stage in stages.items():
        if stage.type == "recaption":
            model, revision = stage.model_identity(models.get(name, {}).get("digest", ""))
            described.append(
                {
                    "stage": name,
                    "columns": [column.name for column in stage.adds if column.captions],
                    "model": model,
                    "revision": revision,
                    "sampling": {**stage.sampling.plain(), "seed": stage.seed},
                    "score": scorers.get(name),
                }
            )
    return described
