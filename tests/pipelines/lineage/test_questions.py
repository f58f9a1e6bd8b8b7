"""trace, impact, resolve and exposures against brute force and by example."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.lineage.catalog import Catalog, artifacts, attempts, edges, open_catalog, runs
from pipelines.lineage.questions import (
    ArtifactInfo,
    Lineage,
    RunInfo,
    exposures,
    impact,
    resolve,
    show,
    trace,
)
from pipelines.lineage.record import Artifact, record_run
from pipelines.lineage.tree import build, lines, printable, rich_tree

Graph = Sequence[tuple[frozenset[int], frozenset[int]]]  # a run: the artifacts it reads, those it writes


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return open_catalog(str(tmp_path_factory.mktemp("scratch") / "catalog.db"))


_graphs = itertools.count()


def _write(catalog: Catalog, graph: Graph) -> str:
    """Put a graph into the tables, under names that no other graph in the catalog has; gives their prefix."""
    prefix = f"g{next(_graphs)}-"
    now = datetime(2026, 3, 1, tzinfo=UTC)
    common = {"status": "succeeded", "started": now, "host": "h", "code_version": "1", "config_digest": "c"}
    ids = [f"{prefix}{number}" for number in range(len(graph))]
    present = sorted({one for read, wrote in graph for one in read | wrote})
    with catalog.write() as connection:
        connection.execute(
            runs.insert().values(kind="train", name=f"{prefix}run", config={}, seeds={}, **common),
            [{"id": n} for n in ids],
        )
        connection.execute(attempts.insert().values(number=1, process=1, **common), [{"run_id": n} for n in ids])
        if present:
            connection.execute(
                artifacts.insert().values(kind="model", name="", address="", facts={}, first_seen=now),
                [{"digest": f"{prefix}a{one}"} for one in present],
            )
        found = connection.execute(sa.select(artifacts.c.digest, artifacts.c.id)).all()
        number_of = {row.digest: row.id for row in found}
        links = [
            {"run_id": run, "role": role, "artifact_id": number_of[f"{prefix}a{one}"], "position": place, "address": ""}
            for run, (read, wrote) in zip(ids, graph, strict=True)
            for role, many in (("input", read), ("output", wrote))
            for place, one in enumerate(sorted(many))
        ]
        if links:
            connection.execute(edges.insert(), links)
    return prefix


def _brute(graph: Graph, start: int, forward: bool) -> tuple[set[int], set[int]]:
    """Artifacts and runs that lie behind (or ahead of) an artifact, by walking until nothing is new."""
    seen = {start}
    walked: set[int] = set()
    while True:
        before = len(seen), len(walked)
        for number, (read, wrote) in enumerate(graph):
            enter, leave = (read, wrote) if forward else (wrote, read)
            if enter & seen:
                walked.add(number)
                seen |= leave
        if before == (len(seen), len(walked)):
            return seen, walked


_sets = st.frozensets(st.integers(0, 7), max_size=4)
_random_graphs = st.lists(st.tuples(_sets, _sets), min_size=1, max_size=7)


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graph=_random_graphs, start=st.integers(0, 7), forward=st.booleans())
def test_closure_is_that_of_brute_force(scratch: Catalog, graph: Graph, start: int, forward: bool) -> None:
    """On any graph, cycles and runs that read what they write included."""
    prefix = _write(scratch, graph)
    present = {one for read, wrote in graph for one in read | wrote}
    if start not in present:
        with pytest.raises(ValueError, match="nothing in the catalog"):
            trace(scratch, f"{prefix}a{start}")
        return
    found = (impact if forward else trace)(scratch, f"{prefix}a{start}")
    seen, walked = _brute(graph, start, forward)
    assert {one.digest for one in found.artifacts.values()} == {f"{prefix}a{one}" for one in seen}
    assert set(found.runs) == {f"{prefix}{number}" for number in walked}
    for edge in found.edges:
        assert edge.artifact_id in found.artifacts
        assert edge.run_id in found.runs
    # Every artifact of the part hangs in the tree somewhere, and drawing it ends.
    text = "\n".join(lines(build(found, everything=True)))
    assert all(f"{prefix}a{one}"[:12] in text for one in seen)


@pytest.mark.postgres
def test_closure_on_postgres(postgres_url: str) -> None:
    catalog = open_catalog(postgres_url)
    graph = [
        (frozenset({0, 1}), frozenset({2})),
        (frozenset({2}), frozenset({3, 4})),
        (frozenset({3, 2}), frozenset({5, 3})),
    ]
    prefix = _write(catalog, graph)
    for start, forward in itertools.product(range(6), (True, False)):
        found = (impact if forward else trace)(catalog, f"{prefix}a{start}")
        assert {one.digest for one in found.artifacts.values()} == {
            f"{prefix}a{one}" for one in _brute(graph, start, forward)[0]
        }


def test_a_closure_is_few_queries_however_deep(sqlite_catalog: Catalog) -> None:
    depth = 1500
    prefix = _write(sqlite_catalog, [(frozenset({n}), frozenset({n + 1})) for n in range(depth)])
    queries: list[str] = []

    def on_query(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if statement.startswith(("SELECT", "WITH")):
            queries.append(statement)

    sa.event.listen(sqlite_catalog.engine, "before_cursor_execute", on_query)
    found = trace(sqlite_catalog, f"{prefix}a{depth}")
    assert len(found.runs) == depth
    assert len(queries) <= 8
    drawn = list(lines(build(found)))  # deeper than Python recurses
    assert len(drawn) == 2 * depth + 1


@pytest.fixture
def family(sqlite_catalog: Catalog) -> Catalog:
    """Raw shards -> snapshot -> teacher -> student, a stricter snapshot, and weights from outside."""
    with record_run(sqlite_catalog, kind="curate", name="flickr", run_id="curate-1") as run:
        run.consume_many(Artifact("raw_shard", f"{n:064x}", f"/raw/{n:05d}.tar", f"{n:05d}.tar") for n in range(20))
        run.consume(Artifact("weights", "c1" * 16, name="ViT-L-14"))
        run.produce(Artifact("snapshot", "5a" * 16, "/out/snapshots/5a", "flickr"))
    with record_run(sqlite_catalog, kind="select", name="strict") as run:
        run.consume(Artifact("snapshot", "5a" * 16))
        run.produce(Artifact("snapshot", "5b" * 16, "/out/snapshots/5b", "strict"))
    with record_run(sqlite_catalog, kind="train", name="teacher-run", run_id="train-1") as run:
        run.consume(Artifact("snapshot", "5a" * 16))
        run.produce_many(Artifact("checkpoint", f"c{n}", name=f"step-{n}") for n in range(10))
        run.consume(Artifact("checkpoint", "c3"))  # it was resumed from there
        run.produce(Artifact("model", "70" * 16, name="teacher"))
    with record_run(sqlite_catalog, kind="distill", name="student-run") as run:
        run.consume_many([Artifact("snapshot", "5b" * 16), Artifact("model", "70" * 16)])
        run.produce(Artifact("student", "57" * 16, name="student", facts={"steps": 4}))
    return sqlite_catalog


def test_trace_reaches_every_raw_shard_with_its_digest(family: Catalog) -> None:
    found = trace(family, "student")
    assert [one.digest for one in found.of_kind("raw_shard")] == [f"{n:064x}" for n in range(20)]
    assert [one.name for one in found.unknown_origin()] == ["ViT-L-14"]
    said = found.to_json()
    assert len(said["raw_shards"]) == 20
    assert said["unknown_origin"] == ["weights:" + "c1" * 16]
    assert json.dumps(said)
    text = "\n".join(lines(build(found)))
    assert "and 14 more of 20 raw shards" in text
    assert text.count("curate run flickr") == 1 + text.count("curate run flickr  (shown above)")
    assert "origin unknown" in text
    assert "and 14 more" not in "\n".join(lines(build(found, everything=True)))


def test_impact_reaches_the_students(family: Catalog) -> None:
    found = impact(family, "00007.tar")
    assert {one.name for one in found.of_kind("snapshot", "model", "student")} == {
        "flickr",
        "strict",
        "teacher",
        "student",
    }
    assert found.unknown_origin() == []


def test_plain_and_ascii_trees_tell_the_same(family: Catalog) -> None:
    root = build(trace(family, "student"))
    plain, ascii_only = list(lines(root)), list(lines(root, ascii_only=True))
    assert len(plain) == len(ascii_only)
    assert all(line.isascii() for line in ascii_only)


def test_names_reach_a_terminal_as_text(sqlite_catalog: Catalog) -> None:
    nasty = "[red]x[/red]\x1b[31m\x1b]0;pwned\x07\nnew line\u202e"
    with record_run(sqlite_catalog, kind="train", name=nasty) as run:
        run.produce(Artifact("model", "m1", name=nasty, address=nasty, facts={nasty: nasty}))
    root = build(trace(sqlite_catalog, "m1"))
    for line in lines(root):
        assert not set(line) & set("\x1b\x07\n\u202e")
        assert "[red]x[/red]" in line

    from rich.console import Console

    console = Console(width=400, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(rich_tree(root))
    assert "[red]x[/red]\\x1b[31m" in captured.get()
    assert printable("plain ä 图") == "plain ä 图"


class TestResolve:
    def test_by_digest_prefix_name_run_and_path(self, family: Catalog, tmp_path: Path) -> None:
        for text in ("57" * 16, "5757", "student", "student:student", "student:5757"):
            found = resolve(family, text)
            assert isinstance(found, ArtifactInfo)
            assert found.digest == "57" * 16
        for text in ("train-1", "teacher-run", "train:teacher-run"):
            assert isinstance(resolve(family, text), RunInfo)
        assert resolve(family, "/raw/00003.tar").name == "00003.tar"
        (tmp_path / "store" / "snapshots").mkdir(parents=True)
        (tmp_path / "store" / "latest").write_text("5b" * 16 + "\n")
        assert resolve(family, str(tmp_path / "store")).name == "strict"
        (tmp_path / "run" / "model").mkdir(parents=True)
        (tmp_path / "run" / "run.json").write_text(json.dumps({"id": "train-1"}))
        assert resolve(family, str(tmp_path / "run")).name == "teacher-run"
        (tmp_path / "run" / "model" / "model.json").write_text(json.dumps({"digest": "70" * 16}))
        assert resolve(family, str(tmp_path / "run")).name == "teacher"
        assert resolve(family, str(tmp_path / "run" / "model")).name == "teacher"

    def test_ambiguous_lists_the_candidates(self, family: Catalog) -> None:
        with pytest.raises(ValueError, match=r"'0000' is ambiguous, 20 fit: raw_shard 0000.*and 12 more; give more"):
            resolve(family, "0000")
        with record_run(family, kind="train", name="again") as run:
            run.produce(Artifact("model", "71" * 16, name="teacher"))
        with pytest.raises(ValueError, match=r"2 fit: model 7171\d+ \(teacher, .*model 7070\d+ \(teacher"):
            resolve(family, "teacher")

    @pytest.mark.parametrize(
        "text", ["%%%%", "____", "x' OR '1'='1", "57\0", "zz", "57", "", "student:", ":", "no/where"]
    )
    def test_nothing_fits(self, family: Catalog, text: str) -> None:
        with pytest.raises(ValueError, match=r"nothing in the catalog .*1 student.*give a name"):
            resolve(family, text)

    def test_an_empty_catalog_says_so(self, sqlite_catalog: Catalog) -> None:
        with pytest.raises(ValueError, match="it holds nothing yet"):
            resolve(sqlite_catalog, "student")


def test_show_tells_the_neighbours(family: Catalog) -> None:
    card = show(family, "teacher")
    assert [run.name for run in card.made_by] == ["teacher-run"]
    assert [run.name for run in card.used_by] == ["student-run"]
    run_card = show(family, "train-1")
    assert [one.kind for one in run_card.read] == ["snapshot", "checkpoint"]
    assert len(run_card.wrote) == 11
    assert json.dumps(run_card.to_json())
    assert json.dumps(card.to_json())


def test_a_run_can_be_traced_itself(family: Catalog) -> None:
    found = trace(family, "train-1")
    assert isinstance(found, Lineage)
    assert "train-1" in found.runs
    assert len(found.of_kind("raw_shard")) == 20
    assert next(lines(build(found))).startswith("train run teacher-run")


class TestExposures:
    def test_direct_and_inherited(self, family: Catalog) -> None:
        found = {one.run.name: one for one in exposures(family, ["5a" * 16])}
        assert set(found) == {"teacher-run", "student-run"}
        teacher, student = found["teacher-run"], found["student-run"]
        assert (teacher.direct, teacher.grade) == (True, "member")
        assert "teacher" in {one.name for one in teacher.made}
        assert (student.direct, student.through.name) == (False, "teacher")
        assert [one.name for one in student.made] == ["student"]

    def test_a_later_snapshot_answers_for_itself(self, family: Catalog) -> None:
        """The stricter snapshot may have dropped the sample, so what only it fed is not claimed."""
        found = exposures(family, ["5b" * 16])
        assert [(one.run.name, one.direct) for one in found] == [("student-run", True)]

    def test_none(self, family: Catalog) -> None:
        assert exposures(family, []) == []
        assert exposures(family, ["no such snapshot"]) == []
