"""A tiny snapshot and tiny training runs made by hand, with the truth about them: files as the contracts say.

    made = make_snapshot(tmp_path)                       # raw tars, a store with one snapshot, and what is true of it
    student = make_run(tmp_path / "student", kind="distill", snapshot=made)

Tests of readers (lineage, reports) stand on these, so that they fail for their own reasons only.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

COLOURS = {
    "red": (208, 60, 48),
    "blue": (48, 98, 190),
    "green": (60, 150, 80),
    "gold": (222, 170, 40),
    "grey": (120, 120, 130),
}
SHAPES = ("circle", "square", "triangle")
ROWS_A_SHARD = 40
RULES = {
    "min_side": {"type": "threshold", "column": "decode.short_side", "at_least": 64.0, "at_most": None},
    "words": {"type": "threshold", "column": "text.flaw", "is_null": True},
    "clip": {"type": "threshold", "column": "clip.score", "at_least": 0.24, "at_most": None},
    "near": {"type": "near_duplicates", "hash": "hash.phash64", "radius": 8},
    "best": {"type": "top_fraction", "column": "aesthetic.score", "fraction": 0.9},
}
ASKED = {
    "min_side": "at_least 64.0",
    "words": "is_null True",
    "clip": "at_least 0.24",
    "near": "more than 8 bits from every kept one",
    "best": "top 0.9 of those alive",
}
FIRST_COLUMN = {name: str(rule.get("column") or rule.get("hash")) for name, rule in RULES.items()}
COLUMNS: list[dict[str, Any]] = [
    {"name": "decode.width", "type": "int32", "unit": "px", "scale": "", "stage": "decode"},
    {"name": "decode.short_side", "type": "int32", "unit": "px", "scale": "", "stage": "decode"},
    {"name": "text.flaw", "type": "string", "unit": "", "scale": "", "stage": "text"},
    {"name": "hash.phash64", "type": "uint64", "unit": "", "scale": "imagehash.phash", "stage": "hash"},
    {
        "name": "clip.score",
        "type": "float32",
        "unit": "",
        "scale": "cosine -1..1",
        "stage": "clip",
        "model_digest": "c1" * 16,
    },
    {
        "name": "aesthetic.score",
        "type": "float32",
        "unit": "",
        "scale": "about 1..10",
        "stage": "aesthetic",
        "model_digest": "ae" * 16,
    },
]
STAGES = ("decode", "text", "hash", "clip", "aesthetic")


@dataclass
class Handmade:
    """A store with one snapshot, and the truth: every ledger row, the raw shards, pictures by (shard, index)."""

    store: Path
    snapshot: Path
    id: str
    rows: list[dict[str, Any]]
    captions: list[dict[str, Any]]
    manifest: dict[str, Any]
    raw: dict[str, Path]
    pictures: dict[tuple[str, int], bytes] = field(repr=False)

    def image(self, shard: str, key: str, member: str | None, index: int) -> bytes | None:
        return self.pictures.get((shard, index))

    def counts(self) -> Counter[str]:
        """Rows by rule for rejected ones, and by verdict for the others."""
        return Counter(row["rule"] if row["verdict"] == "rejected" else row["verdict"] for row in self.rows)

    def first(self, **wanted: Any) -> dict[str, Any]:
        """The first row with these values."""
        return next(row for row in self.rows if all(row[name] == value for name, value in wanted.items()))


def draw(shape: str, colour: str, size: tuple[int, int], seed: int) -> Image.Image:
    """A drawn shape on a light ground."""
    chance = random.Random(seed)
    picture = Image.new("RGB", size, tuple(chance.randint(222, 250) for _ in range(3)))
    pen, (width, height) = ImageDraw.Draw(picture), size
    r = min(size) * chance.uniform(0.22, 0.36)
    x, y = width * chance.uniform(0.4, 0.6), height * chance.uniform(0.4, 0.6)
    fill = COLOURS[colour]
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    else:
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    return picture


def encoded(picture: Image.Image, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **({"quality": 88} if kind == "JPEG" else {}))
    return out.getvalue()


def short_digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def make_snapshot(
    root: Path,
    shards: int = 2,
    rows_a_shard: int = ROWS_A_SHARD,
    captions: Mapping[int, str] | None = None,
    keys: Mapping[int, str] | None = None,
    seed: int = 0,
) -> Handmade:
    """Write raw tars and a store below `root`. captions, keys: texts laid over those of rows, by running number."""
    chance = random.Random(seed)
    rows: list[dict[str, Any]] = []
    captions_rows: list[dict[str, Any]] = []
    pictures: dict[tuple[str, int], bytes] = {}
    raw: dict[str, Path] = {}
    (root / "raw").mkdir(parents=True, exist_ok=True)
    shard_rows: list[list[dict[str, Any]]] = []
    for shard in range(shards):
        path = root / "raw" / f"{shard:05d}.tar"
        mine = []
        with tarfile.open(path, "w") as archive:
            for index in range(rows_a_shard):
                number = shard * rows_a_shard + index
                row, data, caption = _row(number, index, chance, (captions or {}).get(number), (keys or {}).get(number))
                for name, content in ((row["member"], data), (f"{row['member'][:-4]}.txt", caption.encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
                mine.append((row, data, caption))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        raw[digest] = path
        for row, data, caption in mine:
            row["shard"] = digest
            pictures[digest, row["index"]] = data
            captions_rows.append(
                {
                    "uid": row["uid"],
                    "caption_id": short_digest(row["uid"], "original"),
                    "source": "original",
                    "model": None,
                    "revision": None,
                    "text": caption,
                    "token_count": len(caption.split()),
                    "clip_score": row["clip.score"],
                    "status": "ok",
                }
            )
        shard_rows.append([row for row, _, _ in mine])
        rows += shard_rows[-1]
    funnel, cuts = _judge(rows)
    manifest = _manifest(rows, shard_rows, list(raw), funnel, cuts)
    store = root / "out"
    folder = store / "snapshots" / manifest["id"]
    _write_tables(folder, shard_rows, captions_rows)
    _write_shards(folder, shard_rows, pictures, {row["uid"]: row["text"] for row in captions_rows})
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    (folder / "provenance.json").write_text(
        json.dumps(
            {
                "started": "2026-03-01T10:00:00+00:00",
                "finished": "2026-03-01T10:04:12+00:00",
                "host": "handmade",
                "command": "sluice curate handmade.yaml",
                "inputs": [{"digest": digest, "address": str(path)} for digest, path in raw.items()],
            }
        )
    )
    (store / "latest").write_text(manifest["id"])
    return Handmade(store, folder, manifest["id"], rows, captions_rows, manifest, raw, pictures)


def _row(
    number: int, index: int, chance: random.Random, caption: str | None, key: str | None
) -> tuple[dict[str, Any], bytes, str]:
    shape, colour = SHAPES[number % 3], list(COLOURS)[number % 5]
    fate = {5: "broken", 9: "small", 14: "boilerplate", 19: "copy"}.get(number % 20, "plain")
    size = (48, 40) if fate == "small" else (120 + 8 * (number % 7), 96 + 8 * (number % 5))
    # A copy is its predecessor drawn again and encoded anew, a little brighter.
    drawn = number - 1 if fate == "copy" else number
    if fate == "copy":
        shape, colour = SHAPES[drawn % 3], list(COLOURS)[drawn % 5]
        size = (120 + 8 * (drawn % 7), 96 + 8 * (drawn % 5))
    picture = draw(shape, colour, size, drawn)
    if fate == "copy":
        picture = picture.point(lambda value: min(255, value + 6))
    data = encoded(picture)
    if fate == "broken":
        data = data[: len(data) // 3]
    text = caption if caption is not None else ("click here to buy" if fate == "boilerplate" else f"a {colour} {shape}")
    image_digest = hashlib.sha256(data).hexdigest()
    broken = fate == "broken"
    score = max(0.02, min(0.5, chance.gauss(0.31, 0.055)))
    row = {
        "uid": short_digest("sluice1", image_digest, text),
        "image_id": image_digest[:32],
        "shard": "",
        "key": key if key is not None else f"{number:09d}",
        "index": index,
        "member": f"{number:09d}.jpg",
        "source_uid": None,
        "url": f"https://example.org/{number}.jpg",
        "size_bytes": len(data),
        "verdict": "kept",
        "stage": None,
        "rule": None,
        "reason": None,
        "value": None,
        "threshold": None,
        "failed_rules": [],
        "keeper_uid": None,
        "distance": None,
        "split": None,
        "output_shard": None,
        "output_key": None,
        "decode.width": None if broken else size[0],
        "decode.short_side": None if broken else min(size),
        "decode.error": "truncated file" if broken else None,
        "text.flaw": "boilerplate" if fate == "boilerplate" else None,
        "text.error": None,
        "hash.phash64": None
        if broken
        else (0x9E3779B97F4A7C15 * (drawn + 1)) % 2**64 ^ (0b101 if fate == "copy" else 0),
        "hash.error": "truncated file" if broken else None,
        "clip.score": None if broken else score,
        "clip.error": "truncated file" if broken else None,
        "aesthetic.score": None if broken else max(1.0, min(9.5, chance.gauss(5.2, 1.1))),
        "aesthetic.error": "truncated file" if broken else None,
    }
    return row, data, text


def _judge(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rules of RULES, written out naively."""
    cuts: dict[str, Any] = {}

    def reject(row: dict[str, Any], rule: str, reason: str, value: float | None, threshold: float | None) -> None:
        row["failed_rules"].append(rule)
        if row["verdict"] == "kept":
            column = FIRST_COLUMN[rule]
            row.update(
                verdict="rejected",
                stage=column.split(".")[0],
                rule=rule,
                reason=reason,
                value=value,
                threshold=threshold,
            )

    def alive() -> list[dict[str, Any]]:
        return [row for row in rows if row["verdict"] == "kept"]

    for row in rows:
        if row["decode.error"]:
            row.update(verdict="failed", stage="decode", reason=row["decode.error"])
    steps: list[dict[str, Any]] = []
    for rule in RULES:
        before = len(alive())
        if rule == "min_side":
            for row in rows:
                if row["verdict"] != "failed" and row["decode.short_side"] < 64:
                    reject(
                        row,
                        rule,
                        f"decode.short_side {row['decode.short_side']} is below 64",
                        row["decode.short_side"],
                        64.0,
                    )
        elif rule == "words":
            for row in rows:
                if row["verdict"] != "failed" and row["text.flaw"]:
                    reject(row, rule, f"text.flaw: {row['text.flaw']}", None, None)
        elif rule == "clip":
            for row in rows:
                if row["verdict"] != "failed" and row["clip.score"] < 0.24:
                    reject(row, rule, f"clip.score {row['clip.score']:.6g} is below 0.24", row["clip.score"], 0.24)
        elif rule == "near":
            seen: dict[int, dict[str, Any]] = {}
            for row in alive():
                twin = next((o for h, o in seen.items() if (h ^ row["hash.phash64"]).bit_count() <= 8), None)
                if twin is None:
                    seen[row["hash.phash64"]] = row
                    continue
                bits = (twin["hash.phash64"] ^ row["hash.phash64"]).bit_count()
                reject(row, rule, f"{bits} bits from the keeper", bits, 8.0)
                row.update(keeper_uid=twin["uid"], distance=float(bits))
        else:
            ranked = sorted(alive(), key=lambda row: (-row["aesthetic.score"], row["uid"]))
            count = math.floor(0.9 * len(ranked) + 1e-9)
            cut = ranked[count - 1]["aesthetic.score"]
            cuts[rule] = {"fraction": 0.9, "cut": cut, "kept": count, "of": len(ranked)}
            for row in ranked[count:]:
                reject(row, rule, f"aesthetic.score is not in the top 0.9 (cut {cut:.6g})", row["aesthetic.score"], cut)
        after = len(alive())
        steps.append(
            {
                "rule": rule,
                "type": RULES[rule]["type"],
                "column": FIRST_COLUMN[rule],
                "threshold": ASKED[rule],
                "in": before,
                "rejected": before - after,
                "out": after,
            }
        )
    kept = alive()
    for place, row in enumerate(kept):
        row["split"] = "held_out" if place % 8 == 3 else "train"
    failed = [row for row in rows if row["verdict"] == "failed"]
    funnel = {
        "rows_in": len(rows),
        "failed": len(failed),
        "rejected": len(rows) - len(failed) - len(kept),
        "kept": len(kept),
        "failures": dict(Counter(f"{row['stage']}: {row['reason']}" for row in failed)),
        "steps": steps,
    }
    return funnel, cuts


def _manifest(
    rows: Sequence[dict[str, Any]],
    shard_rows: Sequence[Sequence[dict[str, Any]]],
    digests: Sequence[str],
    funnel: dict[str, Any],
    cuts: dict[str, Any],
) -> dict[str, Any]:
    shards = []
    for number, mine in enumerate(shard_rows):
        kept = [row for row in mine if row["verdict"] == "kept"]
        for row in kept:
            row.update(output_shard=f"shards/{number:06d}.tar", output_key=f"{number:06d}{row['index']:06d}")
        shards.append(
            {
                "path": f"shards/{number:06d}.tar",
                "digest": short_digest("shard", number),
                "count": len(kept),
                "held_out": sum(row["split"] == "held_out" for row in kept),
                "size_bytes": sum(row["size_bytes"] for row in kept),
                "inputs": [digests[number]],
            }
        )
    held_out = sum(row["split"] == "held_out" for row in rows)
    return {
        "schema_version": "1.0",
        "kind": "snapshot",
        "id": short_digest("snapshot", rows),
        "parents": [],
        "recipe": {
            "stages": {stage: {"type": stage} for stage in STAGES},
            "rules": RULES,
            "held_out": {"fraction": 0.125, "seed": 0},
            "pack": {"input_shards": 1},
        },
        "code_version": "0.1.0",
        "models": {
            "clip": {"digest": "c1" * 16, "files": {"model": "c2" * 32}},
            "aesthetic": {"digest": "ae" * 16, "files": {}},
        },
        "numerics": {"device": "cpu", "dtype": "float32", "versions": {"torch": "2"}},
        "cuts": cuts,
        "held_out": {"fraction": 0.125, "rows": held_out, "groups": held_out, "inherited": 0},
        "columns": [{"model_digest": "", "feature": False, **column} for column in COLUMNS],
        "inputs": [
            {"digest": digest, "rows": len(mine), "kept": sum(row["verdict"] == "kept" for row in mine)}
            for digest, mine in zip(digests, shard_rows, strict=True)
        ],
        "shards": shards,
        "files": {
            f"{table}/{number:06d}.parquet": {"digest": short_digest(table, number), "rows": len(mine)}
            for table in ("ledger", "captions")
            for number, mine in enumerate(shard_rows)
        },
        "funnel": funnel,
    }


def _write_tables(
    folder: Path, shard_rows: Sequence[Sequence[dict[str, Any]]], captions: Sequence[dict[str, Any]]
) -> None:
    types = {column["name"]: pa.type_for_alias(column["type"]) for column in COLUMNS}
    fixed = {
        "index": pa.int64(),
        "size_bytes": pa.int64(),
        "value": pa.float64(),
        "threshold": pa.float64(),
        "distance": pa.float64(),
        "failed_rules": pa.list_(pa.string()),
    }
    schema = pa.schema([(name, types.get(name) or fixed.get(name) or pa.string()) for name in shard_rows[0][0]])
    by_uid: dict[str, list[dict[str, Any]]] = {}
    for caption in captions:
        by_uid.setdefault(caption["uid"], []).append(caption)
    caption_schema = pa.schema(
        [(name, pa.string()) for name in ("uid", "caption_id", "source", "model", "revision", "text")]
        + [("token_count", pa.int32()), ("clip_score", pa.float32()), ("status", pa.string())]
    )
    for number, mine in enumerate(shard_rows):
        for table, content, kind in (
            ("ledger", list(mine), schema),
            ("captions", [caption for row in mine for caption in by_uid[row["uid"]]], caption_schema),
        ):
            path = folder / table / f"{number:06d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(content, kind), path)


def _write_shards(
    folder: Path,
    shard_rows: Sequence[Sequence[dict[str, Any]]],
    pictures: Mapping[tuple[str, int], bytes],
    captions: Mapping[str, str],
) -> None:
    (folder / "shards").mkdir()
    for number, mine in enumerate(shard_rows):
        with tarfile.open(folder / "shards" / f"{number:06d}.tar", "w") as archive:
            for row in mine:
                if row["verdict"] == "kept":
                    for suffix, content in (
                        ("jpg", pictures[row["shard"], row["index"]]),
                        ("txt", captions[row["uid"]].encode()),
                    ):
                        entry = tarfile.TarInfo(f"{row['output_key']}.{suffix}")
                        entry.size = len(content)
                        archive.addfile(entry, io.BytesIO(content))


# --- training runs ---------------------------------------------------------------------------------------------------


def make_run(
    folder: Path,
    kind: str = "train",
    snapshot: Handmade | None = None,
    teacher: Path | None = None,
    steps: int = 600,
    prompts: Sequence[str] | None = None,
    evaluation: Any = None,
) -> Path:
    """Write a finished run: run.json, metrics.jsonl, model/model.json, and for a distillation drawn samples."""
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "id": short_digest("run", str(folder)),
        "kind": kind,
        "recipe": {
            "model": {"width": 128, "depth": 6, "heads": 4},
            "optimizer": {"type": "adamw", "lr": 0.0003, "betas": [0.9, 0.95]},
            "steps": steps,
            "batch": 64,
            "seed": 0,
        },
        "snapshot": {"id": snapshot.id, "address": str(snapshot.snapshot)} if snapshot else None,
        "teacher": {"digest": short_digest("model", str(teacher)), "address": str(teacher / "model")}
        if teacher
        else None,
        "versions": {"torch": "2.15", "deepspeed": "0.19"},
    }
    (folder / "run.json").write_text(json.dumps(run))
    chance = random.Random(len(str(folder)))
    lines = []
    for step in range(10, steps + 1, 10):
        loss = 0.18 + 1.4 * math.exp(-step / (steps / 6)) + chance.gauss(0, 0.02)
        common = {"lr": 0.0003, "grad_norm": 1.0, "seconds": step * 0.21, "samples_seen": step * 64}
        lines.append({"step": step, "loss": loss, "split": "train", **common})
        if step % 100 == 0:
            lines.append({"step": step, "loss": loss + 0.03, "split": "held_out", **common})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = {
        "kind": "student" if kind == "distill" else "teacher",
        "digest": short_digest("model", str(folder)),
        "method": "consistency" if kind == "distill" else "flow_matching",
        "steps": 4 if kind == "distill" else 20,
        "resolution": 32,
    }
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "model.json").write_text(json.dumps(model))
    if kind == "distill":
        wanted = prompts or [f"a {colour} {shape}" for colour in list(COLOURS)[:4] for shape in SHAPES[:2]]
        for who, count, seconds in (("teacher", 20, 1.9), ("student", 4, 0.42)):
            target = folder / "samples" / who
            target.mkdir(parents=True, exist_ok=True)
            drawn = []
            for number, prompt in enumerate(wanted):
                words = prompt.split()
                shape = next((word for word in words if word in SHAPES), "circle")
                colour = next((word for word in words if word in COLOURS), "grey")
                (target / f"{number:03d}.png").write_bytes(encoded(draw(shape, colour, (32, 32), number), "PNG"))
                drawn.append({"prompt": prompt, "file": f"{number:03d}.png", "steps": count, "seconds": seconds})
            (target / "samples.json").write_text(json.dumps(drawn))
        (folder / "evaluation.json").write_text(
            json.dumps(
                evaluation
                or {
                    "teacher": {"prompts": 200, "colour_rate": 0.975, "shape_rate": 0.86},
                    "student": {"prompts": 200, "colour_rate": 0.96, "shape_rate": 0.815},
                }
            )
        )
    return folder
