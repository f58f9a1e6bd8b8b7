"""`why` on a snapshot made by hand: the whole story, for every fate, and nothing but data out of data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import duckdb
import pytest

from pipelines.lineage.catalog import Catalog
from pipelines.lineage.commands import answer_lines
from pipelines.lineage.ledger import open_ledger
from pipelines.lineage.record import Artifact, record_run
from pipelines.lineage.samples import Answer, why
from tests.pipelines.handmade import Handmade, make_snapshot, short_digest

HOSTILE = "x'); DROP TABLE ledger; --<script>alert(1)</script>\x1b[31m"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Handmade:
    return make_snapshot(tmp_path_factory.mktemp("made"), captions={2: HOSTILE}, keys={2: HOSTILE})


@pytest.fixture
def known(made: Handmade, sqlite_catalog: Catalog) -> Catalog:
    """A catalog that knows the snapshot, a teacher trained on it and a student of that teacher."""
    with record_run(sqlite_catalog, kind="curate", name="handmade") as run:
        run.consume_many(Artifact("raw_shard", digest, str(path), path.name) for digest, path in made.raw.items())
        run.produce(Artifact("snapshot", made.id, str(made.snapshot), "handmade"))
    with record_run(sqlite_catalog, kind="train", name="teacher-run") as run:
        run.consume(Artifact("snapshot", made.id))
        run.produce(Artifact("model", "70" * 16, name="teacher"))
    with record_run(sqlite_catalog, kind="distill", name="student-run") as run:
        run.consume(Artifact("model", "70" * 16))
        run.produce(Artifact("student", "57" * 16, name="student"))
    return sqlite_catalog


def _text(answer: Answer) -> str:
    return "\n".join(answer_lines(answer))


def _only(answer: Answer):
    (story,) = answer.stories
    return story


def test_a_kept_sample(made: Handmade, known: Catalog) -> None:
    row = made.first(verdict="kept", split="train")
    answer = why(known, row["uid"], str(made.store))
    story = _only(answer)
    assert story.source["address"] == str(made.raw[row["shard"]])
    assert [one.rule for one in story.judgements] == ["min_side", "words", "clip", "near", "best"]
    assert {one.state for one in story.judgements} == {"passed"}
    assert story.captions[0]["text"] == next(one["text"] for one in made.captions if one["uid"] == row["uid"])
    score = next(one for one in story.measurements if one.column == "clip.score")
    assert score.value == pytest.approx(row["clip.score"], rel=1e-6)
    assert (score.scale, score.model_digest) == ("cosine -1..1", "c1" * 16)
    assert [(one.run.name, one.direct) for one in answer.exposures] == [("teacher-run", True), ("student-run", False)]
    text = _text(answer)
    for words in (row["key"], row["shard"], row["url"], "KEPT", "at_least 0.24", "model teacher", "indirect", "member"):
        assert words in text
    assert f"{row['output_shard']} as {row['output_key']}" in text
    json.dumps(answer.to_json())


def test_a_row_below_a_threshold(made: Handmade, known: Catalog) -> None:
    row = made.first(rule="clip")
    answer = why(known, row["uid"], str(made.store))
    judged = {one.rule: one for one in _only(answer).judgements}
    assert judged["clip"].state == "failed"
    assert judged["clip"].decided
    assert judged["clip"].value == pytest.approx(row["clip.score"], rel=1e-6)
    assert judged["min_side"].state == "passed"
    assert judged["best"].state == "not_reached"
    assert answer.exposures == []
    text = _text(answer)
    assert "DROPPED by rule clip" in text
    assert "not trained on: no snapshot kept it" in text


def test_every_failed_rule_is_told_not_only_the_first(made: Handmade) -> None:
    row = next((one for one in made.rows if len(one["failed_rules"]) > 1), None)
    if row is None:
        pytest.skip("no row of this snapshot fails two rules")
    judged = {one.rule: one for one in _only(why(None, row["uid"], str(made.store))).judgements}
    assert [name for name, one in judged.items() if one.state == "failed"] == row["failed_rules"]
    assert [name for name, one in judged.items() if one.decided] == [row["rule"]]


def test_a_duplicate_names_its_keeper(made: Handmade, known: Catalog) -> None:
    row = made.first(rule="near")
    keeper = made.first(uid=row["keeper_uid"])
    answer = why(known, row["uid"], str(made.store))
    story = _only(answer)
    assert story.keeper is not None
    assert (story.keeper["uid"], story.keeper["key"], story.keeper["index"]) == (
        keeper["uid"],
        keeper["key"],
        keeper["index"],
    )
    text = _text(answer)
    assert f"{keeper['uid']} at distance 2, key {keeper['key']}" in text
    # It was not trained on itself, but what looks the same was.
    assert answer.exposures == []
    assert bool(answer.keeper_exposures) == (keeper["verdict"] == "kept" and keeper["split"] == "train")


def test_a_held_out_row_was_not_trained_on(made: Handmade, known: Catalog) -> None:
    row = made.first(split="held_out", verdict="kept")
    answer = why(known, row["uid"])
    assert answer.exposures == []
    assert answer.held_out_of == [made.id]
    assert "not trained on: held out of snapshot" in _text(answer)


def test_a_row_that_failed(made: Handmade, known: Catalog) -> None:
    row = made.first(verdict="failed")
    text = _text(why(known, row["uid"], str(made.store)))
    assert "FAILED by stage decode: truncated file" in text


class TestAsking:
    def test_by_prefix_image_url_key_and_file(self, made: Handmade, known: Catalog, tmp_path: Path) -> None:
        row = made.first(verdict="kept")
        picture = tmp_path / "photo.jpg"
        picture.write_bytes(made.pictures[row["shard"], row["index"]])
        for question in (
            row["uid"][:10],
            row["uid"].upper(),
            row["image_id"],
            row["image_id"][:12],
            row["url"],
            row["key"],
            str(picture),
        ):
            assert _only(why(known, question)).row["uid"] == row["uid"]

    def test_a_picture_that_is_not_there(self, made: Handmade, known: Catalog, tmp_path: Path) -> None:
        (tmp_path / "other.jpg").write_bytes(b"something else")
        with pytest.raises(ValueError, match=r"the bytes of .*other\.jpg are in no row"):
            why(known, str(tmp_path / "other.jpg"))

    def test_an_ambiguous_beginning_lists_the_candidates(self, tmp_path: Path) -> None:
        many = make_snapshot(tmp_path, shards=2, rows_a_shard=40)
        counts: dict[str, int] = {}
        for row in many.rows:
            counts[row["key"][:8]] = counts.get(row["key"][:8], 0) + 1
        with pytest.raises(ValueError, match="is in no row"):
            why(None, "zzzz", str(many.store))
        # All keys are distinct, so is a prefix of them no answer at all: keys are asked for whole.
        with pytest.raises(ValueError, match="is in no row"):
            why(None, "00000000", str(many.store))

    @pytest.mark.parametrize(
        "question",
        [
            "' OR 1=1 --",
            "%",
            "*",
            "0000' UNION SELECT * FROM read_csv('/etc/passwd') --",
            "\0",
            "a" * 5000,
            "http://x'--",
        ],
        ids="abcdefg",
    )
    def test_questions_are_only_values(self, made: Handmade, known: Catalog, question: str) -> None:
        with pytest.raises(ValueError, match="is in no row"):
            why(known, question)

    def test_a_snapshot_by_name_or_id(self, made: Handmade, known: Catalog) -> None:
        row = made.first(verdict="kept")
        for name in ("handmade", made.id[:8], str(made.snapshot)):
            assert _only(why(known, row["uid"], name)).snapshot_id == made.id

    def test_no_snapshot_known(self, sqlite_catalog: Catalog) -> None:
        with pytest.raises(ValueError, match="knows no snapshot that can be read"):
            why(sqlite_catalog, "abcd")


def test_hostile_text_stays_text(made: Handmade, known: Catalog) -> None:
    answer = why(known, HOSTILE)
    assert _only(answer).row["key"] == HOSTILE
    text = _text(answer)
    assert "\x1b" not in text
    assert "DROP TABLE ledger" in text


def test_same_bytes_elsewhere_are_named(tmp_path: Path, sqlite_catalog: Catalog) -> None:
    import pyarrow.parquet as pq

    made = make_snapshot(tmp_path)
    path = made.snapshot / "ledger" / "000001.parquet"
    table = pq.read_table(path)
    first = made.rows[0]
    changed = table.set_column(
        table.schema.get_field_index("image_id"),
        "image_id",
        [[first["image_id"], *table["image_id"].to_pylist()[1:]]],
    )
    pq.write_table(changed, path)
    story = _only(why(sqlite_catalog, first["uid"], str(made.store)))
    assert [one["uid"] for one in story.same_image] == [made.rows[40]["uid"]]
    # Asked for by its image, both rows tell their story.
    assert len(why(sqlite_catalog, first["image_id"], str(made.store)).stories) == 2


def test_another_snapshot_of_the_same_shard_is_asked_too(tmp_path: Path, sqlite_catalog: Catalog) -> None:
    made = make_snapshot(tmp_path)
    row = made.first(verdict="kept", split="train")
    # A later selection kept the row as well, and only it was trained on.
    other_id = short_digest("another")
    other = made.store / "snapshots" / other_id
    shutil.copytree(made.snapshot, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "id": other_id}))
    with record_run(sqlite_catalog, kind="curate", name="one") as run:
        run.consume_many(Artifact("raw_shard", digest) for digest in made.raw)
        run.produce(Artifact("snapshot", made.id, str(made.snapshot)))
    with record_run(sqlite_catalog, kind="select", name="two") as run:
        run.consume(Artifact("snapshot", made.id))
        run.produce_many(
            [Artifact("snapshot", other_id, str(other)), Artifact("snapshot", "gone", str(tmp_path / "gone"))]
        )
    with record_run(sqlite_catalog, kind="train", name="on two") as run:
        run.consume(Artifact("snapshot", other_id))
        run.produce(Artifact("model", "m1", name="m"))
    answer = why(sqlite_catalog, row["uid"], str(made.snapshot))
    assert {one.snapshot_id: one.verdict for one in answer.elsewhere} == {other_id: "kept", "gone": None}
    assert [one.run.name for one in answer.exposures] == ["on two"]
    assert "could not be asked" in _text(answer)


@pytest.mark.parametrize("name", ["it's", "a[1]*?", "ünï 图", 'with "quotes"; --'])
def test_the_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    made = make_snapshot(tmp_path / name)
    assert _only(why(None, made.rows[0]["uid"], str(made.store))).row["key"] == made.rows[0]["key"]


def test_queries_reach_nothing_but_the_snapshot(made: Handmade, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("a,b\n1,2\n")
    with open_ledger(made.store) as ledger:
        assert ledger.rows("SELECT count(*) AS n FROM ledger") == [{"n": len(made.rows)}]
        for query in (f"SELECT * FROM read_csv('{tmp_path}/secret.csv')", f"COPY ledger TO '{tmp_path}/out.csv'"):
            with pytest.raises(duckdb.PermissionException):
                ledger.rows(query)


def test_other_filesystems_are_read_through_arrow(made: Handmade) -> None:
    with open_ledger(made.store) as local, open_ledger(made.store) as remote:
        remote.folder.is_local = False
        query = 'SELECT uid, rule, value, failed_rules, "clip.score" FROM ledger WHERE verdict = ? ORDER BY uid'
        assert remote.rows(query, ["rejected"]) == local.rows(query, ["rejected"])
        assert remote.columns == local.columns


def test_a_missing_ledger_file_is_one_sentence(tmp_path: Path) -> None:
    made = make_snapshot(tmp_path)
    (made.snapshot / "ledger" / "000001.parquet").unlink()
    with pytest.raises(ValueError, match=r"lacks ledger/000001\.parquet"):
        why(None, made.rows[0]["uid"], str(made.store))
