"""One sample's whole story: its origin, every score and rule, the verdict, and the models that learned from it.

    why(catalog, "photo.jpg")                     a picture's file, by its bytes
    why(catalog, "0a1b2c", snapshot="out")        the beginning of a uid or image id, in one snapshot

Exposure is stated in one grade, "member": the sample was in the snapshot that a run was given, which bounds from above
what the run really read. A student that learned from a teacher inherits the teacher's exposure and is marked indirect.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from pipelines.lineage.catalog import Catalog, artifacts
from pipelines.lineage.ledger import Ledger, existing_path, open_ledger
from pipelines.lineage.questions import (
    SHORTEST_PREFIX,
    ArtifactInfo,
    Exposure,
    RunInfo,
    artifact_json,
    exposures,
    impact,
    plain,
    resolve,
    run_json,
    snapshots,
)


@dataclass(frozen=True)
class Judgement:
    """One rule and one row: state is passed, failed, not_measured or not_reached."""

    rule: str
    type: str
    column: str | None
    asked: str
    value: Any
    state: str
    decided: bool = False


@dataclass(frozen=True)
class Measurement:
    column: str
    type: str
    value: Any
    unit: str
    scale: str
    model_digest: str
    error: str | None


@dataclass(frozen=True)
class Story:
    """All that a snapshot tells about one occurrence; rows are the ledger's and captions table's own columns."""

    snapshot_id: str
    snapshot_address: str
    row: Mapping[str, Any]
    source: Mapping[str, Any]
    captions: Sequence[Mapping[str, Any]]
    measurements: Sequence[Measurement]
    judgements: Sequence[Judgement]
    keeper: Mapping[str, Any] | None
    same_image: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Elsewhere:
    """What another snapshot says about the same uid; `problem` where it could not be asked."""

    snapshot_id: str
    address: str
    verdict: str | None = None
    rule: str | None = None
    split: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Answer:
    """The answer to `why`: the stories of every occurrence, other snapshots, and the models concerned."""

    question: str
    stories: Sequence[Story]
    elsewhere: Sequence[Elsewhere]
    exposures: Sequence[Exposure]
    held_out_of: Sequence[str]
    keeper_exposures: Sequence[Exposure] = ()

    def to_json(self) -> dict[str, Any]:
        def exposed(one: Exposure) -> dict[str, Any]:
            return {
                "grade": one.grade,
                "direct": one.direct,
                "run": run_json(one.run),
                "made": [artifact_json(made) for made in one.made],
                "through": artifact_json(one.through),
            }

        return {
            "question": self.question,
            "occurrences": [plain(asdict(story)) for story in self.stories],
            "other_snapshots": [plain(asdict(one)) for one in self.elsewhere],
            "trained_on": [exposed(one) for one in self.exposures],
            "held_out_of": list(self.held_out_of),
            "keeper_trained_on": [exposed(one) for one in self.keeper_exposures],
        }


def why(catalog: Catalog | None, question: str, snapshot: str | None = None) -> Answer:
    """The whole story of one sample, named by its uid or image id (or their beginning), picture file, URL or key.

    snapshot: where to look: a path, or what `resolve` finds; by default the catalog's snapshots, the newest that holds
    the sample first. Without a catalog the models stay unknown and are not mentioned. Raises ValueError where nothing
    fits or the question fits several samples.
    """
    import duckdb

    ledgers = _ledgers(catalog, snapshot)
    problems: list[Elsewhere] = []
    asked: list[str] = []
    for address in ledgers:
        try:
            ledger = open_ledger(address)
        except (ValueError, OSError) as error:
            if snapshot is not None:
                raise
            problems.append(Elsewhere("", address, problem=str(error)))
            continue
        with ledger:
            try:
                found = _occurrences(ledger, question)
            except duckdb.Error as error:  # a ledger that lacks what every ledger has: damaged, or not ours
                problems.append(Elsewhere(ledger.id, address, problem=str(error).partition("\n")[0]))
                continue
            asked.append(address)
            if found:
                stories = [_story(ledger, uid, shard, index) for uid, shard, index in found]
                others = _elsewhere(catalog, ledger, stories, problems)
                return _with_exposures(catalog, question, stories, others)
    if not asked and snapshot is None:
        raise ValueError(
            "the catalog knows no snapshot that can be read: name one with --snapshot FOLDER"
            + (f" ({problems[0].problem})" if problems else "")
        )
    looked = asked[0] if len(asked) == 1 else f"{len(asked)} snapshots"
    unread = f" ({len(problems)} more could not be read)" if problems else ""
    path = existing_path(question)
    if path and path.is_file():
        raise ValueError(
            f"the bytes of {question} are in no row of {looked}{unread}; a re-encoded or resized copy is another "
            "image: look it up by its uid or URL"
        )
    raise ValueError(
        f"{question!r} is in no row of {looked}{unread}: give a uid or image id (at least {SHORTEST_PREFIX} hex "
        "digits), a picture's path, its URL or its key"
    )


def _ledgers(catalog: Catalog | None, snapshot: str | None) -> list[str]:
    if snapshot is not None:
        if "://" in snapshot or existing_path(snapshot) or catalog is None:
            return [snapshot]
        found = resolve(catalog, f"snapshot:{snapshot}")
        if isinstance(found, RunInfo) or not found.address:
            raise ValueError(f"snapshot {snapshot!r} has no address in the catalog: give its folder")
        return [found.address]
    if catalog is None:
        raise ValueError("without a catalog, name the snapshot to look in: --snapshot FOLDER")
    return list(dict.fromkeys(one.address for one in snapshots(catalog) if one.address))


def _occurrences(ledger: Ledger, question: str) -> list[tuple[str, str, int]]:
    """(uid, shard, index) of the rows that `question` names; ValueError where it names different samples."""

    def ask(condition: str, *values: Any) -> list[dict[str, Any]]:
        return ledger.rows(
            f'SELECT uid, image_id, shard, "index", verdict FROM ledger WHERE {condition} '
            'ORDER BY uid, shard, "index" LIMIT 1000',
            values,
        )

    path = existing_path(question)
    if path and path.is_file():
        with path.open("rb") as stream:
            image_id = hashlib.file_digest(stream, "sha256").hexdigest()[:32]
        rows = ask("image_id = ?", image_id)
    elif "://" in question:
        rows = ask("url = ?", question)
    else:
        rows = []
        word = question.lower()
        if re.fullmatch(r"[0-9a-f]+", word):
            rows = ask("uid = ?", word) or ask("image_id = ?", word)
            if not rows and len(word) >= SHORTEST_PREFIX:
                # A half-open range rather than LIKE: it is held against the row groups' own minimum and maximum.
                rows = ask(
                    "(uid >= ? AND uid < ?) OR (image_id >= ? AND image_id < ?)", word, word + "g", word, word + "g"
                )
                images = {row["image_id"] for row in rows}
                if len({row["uid"] for row in rows}) > 1 and len(images) > 1:
                    raise ValueError(_ambiguous(question, rows))
        if not rows:
            rows = ask('"key" = ? OR source_uid = ?', question, question)
            if len({row["uid"] for row in rows}) > 1:
                raise ValueError(_ambiguous(question, rows))
    return [(row["uid"], row["shard"], row["index"]) for row in rows]


def _ambiguous(question: str, rows: Sequence[Mapping[str, Any]]) -> str:
    shown = ", ".join(
        f"{row['uid']} ({row['verdict']}, shard {row['shard'][:8]} row {row['index']})" for row in rows[:8]
    )
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    return f"{question!r} is ambiguous, {len(rows)} rows fit: {shown}{more}; give a whole uid"


def _story(ledger: Ledger, uid: str, shard: str, index: int) -> Story:
    row = ledger.rows('SELECT * FROM ledger WHERE uid = ? AND shard = ? AND "index" = ?', [uid, shard, index])[0]
    own = {name: value for name, value in row.items() if name not in ledger.measured}
    measurements = []
    for name, about in ledger.measured.items():
        if name.endswith(".error"):
            continue
        stage = name.rpartition(".")[0]
        measurements.append(
            Measurement(
                name,
                str(ledger.columns[name]),
                row[name],
                str(about.get("unit") or ""),
                str(about.get("scale") or ""),
                str(about.get("model_digest") or ""),
                row.get(f"{stage}.error"),
            )
        )
    keeper = None
    if row["keeper_uid"]:
        # The keeper is the occurrence that was not itself dropped at this step; of several take the most alive.
        candidates = ledger.rows(
            'SELECT uid, image_id, shard, "key", "index", url, verdict, rule, split FROM ledger WHERE uid = ? '
            'AND NOT (shard = ? AND "index" = ?) '
            "ORDER BY verdict <> 'kept', rule IS NOT DISTINCT FROM ?, shard, \"index\" LIMIT 1",
            [row["keeper_uid"], shard, index, row["rule"]],
        )
        keeper = candidates[0] if candidates else {"uid": row["keeper_uid"]}
    same_image = ledger.rows(
        'SELECT uid, shard, "key", "index", verdict, rule, split FROM ledger WHERE image_id = ? '
        'AND NOT (shard = ? AND "index" = ?) ORDER BY uid, shard, "index" LIMIT 20',
        [row["image_id"], shard, index],
    )
    return Story(
        ledger.id,
        ledger.address,
        own,
        ledger.inputs.get(shard, {}),
        ledger.rows(
            "SELECT DISTINCT * FROM captions WHERE uid = ? ORDER BY source <> 'original', caption_id LIMIT 100", [uid]
        ),
        measurements,
        judgements(ledger, row),
        keeper,
        same_image,
    )


def judgements(ledger: Ledger, row: Mapping[str, Any]) -> list[Judgement]:
    """Every rule, in recipe order, held against one whole ledger row."""
    failed = set(row.get("failed_rules") or ())
    decided = row.get("rule") if row["verdict"] != "kept" else None
    order = [step["rule"] for step in ledger.steps]
    stop = order.index(decided) if decided in order else (len(order) if row["verdict"] == "kept" else -1)
    found = []
    for place, step in enumerate(ledger.steps):
        name, column = step["rule"], step.get("column")
        duplicates = str(step.get("type", "")).endswith("_duplicates")
        value = row.get(column) if column else None
        asked = str(step.get("threshold") or "")
        cut = ledger.manifest.get("cuts", {}).get(name)
        if cut and cut.get("cut") is not None:
            asked += f" (cut {cut['cut']:.6g})"
        error = row.get(f"{column.rpartition('.')[0]}.error") if column else None
        is_null_rule = "is_null" in asked
        if name == decided:
            value = row["value"] if row["value"] is not None else value
            state = "failed" if row["verdict"] == "rejected" else "not_measured"
        elif name in failed:
            state = "failed"
        elif error or (column in ledger.columns and value is None and not is_null_rule):
            state, value = "not_measured", error
        elif step.get("type", "threshold") == "threshold":
            # Row rules are judged for every row that they can be, also after the one that decided.
            state = "passed" if row["verdict"] != "failed" or place <= stop else "not_reached"
        else:
            state = "passed" if place <= stop else "not_reached"
        if duplicates and state != "not_measured":
            # What a duplicate rule looks at is a distance; the hash or digest itself tells nobody anything.
            column, value = "distance", row["distance"] if name == decided else None
        found.append(Judgement(name, str(step.get("type") or ""), column, asked, value, state, name == decided))
    return found


def _elsewhere(
    catalog: Catalog | None, ledger: Ledger, stories: Sequence[Story], problems: Sequence[Elsewhere]
) -> list[Elsewhere]:
    """What other snapshots that descend from the same raw shards say about the uids of `stories`."""
    if catalog is None:
        return []
    shards = sorted({str(story.row["shard"]) for story in stories})
    uids = sorted({str(story.row["uid"]) for story in stories})
    wanted: dict[str, ArtifactInfo] = {}
    with catalog.read() as connection:
        query = sa.select(artifacts).where(artifacts.c.kind == "raw_shard", artifacts.c.digest.in_(shards))
        raw = [ArtifactInfo(**row) for row in connection.execute(query).mappings()]
    for shard in raw:
        wanted.update({one.digest: one for one in impact(catalog, shard).of_kind("snapshot")})
    found = list(problems)
    for one in wanted.values():
        if one.digest == ledger.id:
            continue
        try:
            with open_ledger(one.address) as other:
                places = ", ".join("?" for _ in uids)
                rows = other.rows(
                    f"SELECT verdict, rule, split FROM ledger WHERE uid IN ({places}) "
                    "ORDER BY verdict <> 'kept', shard, \"index\" LIMIT 1",
                    uids,
                )
        except (ValueError, OSError) as error:
            found.append(Elsewhere(one.digest, one.address, problem=str(error)))
            continue
        said = rows[0] if rows else {"verdict": "absent", "rule": None, "split": None}
        found.append(Elsewhere(one.digest, one.address, said["verdict"], said["rule"], said["split"]))
    return found


def _with_exposures(
    catalog: Catalog | None, question: str, stories: Sequence[Story], elsewhere: Sequence[Elsewhere]
) -> Answer:
    if catalog is None:
        return Answer(question, stories, elsewhere, [], [])
    states = [(one.snapshot_id, one.row["verdict"], one.row["split"]) for one in stories]
    states += [(one.snapshot_id, one.verdict, one.split) for one in elsewhere]
    kept = [snapshot for snapshot, verdict, split in states if verdict == "kept" and split != "held_out"]
    held_out = [snapshot for snapshot, verdict, split in states if verdict == "kept" and split == "held_out"]
    exposed = exposures(catalog, kept)
    through_keeper: list[Exposure] = []
    if not exposed:
        keepers = {
            story.snapshot_id
            for story in stories
            if story.keeper and story.keeper.get("verdict") == "kept" and story.keeper.get("split") != "held_out"
        }
        through_keeper = exposures(catalog, keepers)
    return Answer(question, stories, elsewhere, exposed, sorted(set(held_out)), through_keeper)
