"""Pages: numbers equal to the truth, duplicates beside their keepers, and other people's text never more than text."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.lineage.ledger import Ledger, open_ledger
from pipelines.lineage.tree import Node
from pipelines.report import facts
from pipelines.report.pages import combined_page, run_page, samples_page, snapshot_page
from pipelines.report.pictures import SnapshotImages, row_thumbnail, thumbnail
from pipelines.report.runs import Table, evaluation_table, loss_lines, read_grid, read_losses
from tests.pipelines.handmade import Handmade, draw, encoded, make_run, make_snapshot
from tests.pipelines.report.reading import Element, assert_inert, read_page

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></title><svg onload=alert(1)>",
    "{{ 7*7 }}{% include '/etc/passwd' %}",
    "javascript:alert(1)//http://evil.example/x.png",
    "]]><!--",
    "a\x00b\x1b[31mc\u202ed\ud800e",
    "&lt;b&gt; &amp;",
    "x" * 20_000,
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Handmade:
    return make_snapshot(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def page(made: Handmade) -> Element:
    return assert_inert(snapshot_page(made.store, made.image))


def _funnel(page: Element) -> dict[str, tuple[int, int, int]]:
    """rule -> (in, ended, left), read from the cells that people see."""
    found = {}
    for line in page.all("tr"):
        if "data-step" in line.attributes:
            numbers = [int(cell.text.replace(",", "").replace("−", "")) for cell in line.all("td", class_="n")]
            found[line.attributes["data-step"]] = tuple(numbers)
            assert numbers == [int(line.attributes[f"data-{name}"]) for name in ("in", "ended", "left")]
    return found  # type: ignore[return-value]


class TestFunnel:
    def test_numbers_on_the_page_are_the_truth(self, made: Handmade, page: Element) -> None:
        counts, seen = made.counts(), _funnel(page)
        assert list(seen) == ["readable", "min_side", "words", "clip", "near", "best"]
        alive = len(made.rows)
        for name, (entering, ended, leaving) in seen.items():
            assert entering == alive
            assert ended == counts["failed" if name == "readable" else name]
            alive -= ended
            assert leaving == alive
        assert alive == counts["kept"]
        (verdict,) = page.all("div", data_balance="yes")
        assert f"80 in = {counts['kept']} kept + {80 - counts['kept'] - counts['failed']} dropped" in verdict.text

    def test_tiles_tell_the_same(self, made: Handmade, page: Element) -> None:
        tiles = {
            tile.all("span")[0].text.split(",")[0]: tile.all("b")[0].text for tile in page.all("div", class_="tile")
        }
        counts = made.counts()
        assert tiles["rows in"] == "80"
        assert tiles["kept"] == str(counts["kept"])
        assert tiles["failed"] == str(counts["failed"])

    @pytest.mark.parametrize(
        ("path", "value", "words"),
        [
            (("kept",), 51, "The manifest says kept 51; the ledger holds"),
            (("steps", 2, "out"), 1, "which leaves"),
            (("steps", 3, "in"), 90, "90 rows enter 'near', but only"),
            (("rows_in",), 81, "rows_in 81"),
        ],
    )
    def test_a_funnel_that_does_not_balance_says_so(
        self, made: Handmade, tmp_path: Path, path: tuple[Any, ...], value: int, words: str
    ) -> None:
        shutil.copytree(made.store, tmp_path / "out")
        file = tmp_path / "out" / "snapshots" / made.id / "manifest.json"
        manifest = json.loads(file.read_text())
        place = manifest["funnel"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        file.write_text(json.dumps(manifest))
        (alert,) = read_page(snapshot_page(tmp_path / "out", made.image)).all("div", data_balance="no")
        assert "does not balance" in alert.text
        assert words in alert.text

    def test_rows_that_fail_at_a_rule_or_between_rules_are_counted_there(self, made: Handmade, tmp_path: Path) -> None:
        """A value that is no number fails at its rule; a costly stage that breaks fails rows between two rules."""
        shutil.copytree(made.store, tmp_path / "out")
        folder = tmp_path / "out" / "snapshots" / made.id
        manifest = json.loads((folder / "manifest.json").read_text())
        kept = [row for row in made.rows if row["verdict"] == "kept"]
        at_rule, between = kept[0]["uid"], kept[1]["uid"]
        for file in (folder / "ledger").iterdir():
            rows = pq.read_table(file).to_pylist()
            schema = pq.read_schema(file)
            for row in rows:
                if row["uid"] == at_rule:
                    row.update(verdict="failed", stage="aesthetic", rule="best", reason="aesthetic.score is not finite")
                if row["uid"] == between:
                    row.update(verdict="failed", stage="clip", rule=None, reason="out of memory")
            pq.write_table(pa.Table.from_pylist(rows, schema), file)
        funnel = manifest["funnel"]
        funnel.update(kept=funnel["kept"] - 2, failed=funnel["failed"] + 2)
        before = [step["rule"] for step in funnel["steps"]].index("clip")
        for place, step in enumerate(funnel["steps"]):
            step["in"] -= place >= before
            step["out"] -= place >= before
        funnel["steps"][-1]["out"] -= 1
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with open_ledger(folder) as ledger:
            found = facts.funnel(ledger)
        assert found.problems == []
        assert {step.name: (step.failed_before, step.failed) for step in found.steps} == {
            "min_side": (4, 0),
            "words": (0, 0),
            "clip": (1, 0),
            "near": (0, 0),
            "best": (0, 1),
        }


class TestSnapshotPage:
    def test_histograms_hold_every_measured_row(self, made: Handmade) -> None:
        with open_ledger(made.store) as ledger:
            steps = {step.name: step for step in facts.funnel(ledger).steps}
            found = {name: facts.distribution(ledger, step) for name, step in steps.items()}
        counts = made.counts()
        for name in ("min_side", "clip", "best"):
            spread = found[name]
            assert spread is not None
            totals = [sum(getattr(one, part) for one in spread.bins) for part in ("kept", "dropped", "elsewhere")]
            measured = 80 - counts["failed"]
            assert totals == [counts["kept"], counts[name], measured - counts["kept"] - counts[name]]
            assert spread.missing == counts["failed"]
        clip = found["clip"]
        assert clip is not None
        assert clip.cuts == [(0.24, "at least 0.24")]
        for one in clip.bins:
            inside = [
                row for row in made.rows if row["clip.score"] is not None and one.low <= row["clip.score"] < one.high
            ]
            assert abs(one.total - len(inside)) <= 1  # float32 may sit on the other side of an edge
        words = found["words"]
        assert words is not None
        assert ("boilerplate", 0, 4) in words.categories
        near = found["near"]
        assert near is not None
        assert [(one.low, one.dropped) for one in near.bins if one.dropped] == [(1.5, counts["near"])]

    def test_one_far_value_does_not_squeeze_the_rest(self, made: Handmade, tmp_path: Path) -> None:
        shutil.copytree(made.store, tmp_path / "out")
        folder = tmp_path / "out" / "snapshots" / made.id / "ledger"
        tables = [pq.read_table(file) for file in sorted(folder.iterdir())]
        # Three hundred copies of the rows, one of them a million pixels high.
        many = pa.concat_tables([tables[0]] * 300).to_pydict()
        place = next(n for n, value in enumerate(many["decode.short_side"]) if value is not None)
        many["decode.short_side"][place] = 1_000_000
        pq.write_table(pa.Table.from_pydict(many, tables[0].schema), sorted(folder.iterdir())[0])
        with open_ledger(tmp_path / "out") as ledger:
            spread = facts.distribution(ledger, facts.funnel(ledger).steps[0])
        assert spread is not None
        assert spread.bins[-1].high < 1000
        assert spread.clipped == 1
        assert sum(one.total for one in spread.bins) == 300 * 38 + 38

    def test_duplicates_stand_beside_their_keepers(self, made: Handmade, page: Element) -> None:
        pairs = page.all("div", class_="pair")
        assert len(pairs) == made.counts()["near"]
        by_key = {row["key"]: row for row in made.rows}
        for pair in pairs:
            dropped, keeper = (by_key[one.text] for one in pair.all("span", class_="key"))
            assert dropped["keeper_uid"] == keeper["uid"]
            assert pair.all("div", class_="apart")[0].text.startswith(f"{dropped['distance']:g} bits")
            assert len(pair.all("img")) == 2

    def test_examples_belong_to_their_rule(self, made: Handmade, page: Element) -> None:
        by_key = {row["key"]: row for row in made.rows}
        for panel in page.all("section", id="rules")[0].all("div", class_="panel"):
            rule = panel.all("h3")[0].text
            shots = [by_key[one.text] for one in panel.all("span", class_="key")]
            if rule != "near":
                assert {row["rule"] for row in shots if row["verdict"] == "rejected"} == {rule}
                assert [row for row in shots if row["verdict"] == "kept"]

    def test_failures_captions_split_and_provenance(self, made: Handmade, page: Element) -> None:
        (failed,) = page.all("section", id="failures")
        assert "decode truncated file 4" in failed.text
        (captions,) = page.all("section", id="captions")
        texts = {caption["text"] for caption in made.captions}
        assert all(cell.text in texts for cell in captions.all("td", class_="text"))
        (split,) = page.all("section", id="split")
        held_out = sum(row["split"] == "held_out" for row in made.rows)
        assert f"{held_out} of {made.counts()['kept']} kept rows" in split.text
        (provenance,) = page.all("section", id="provenance")
        assert "sluice curate handmade.yaml" in provenance.text
        assert all(str(path) in provenance.text for path in made.raw.values())

    def test_the_same_page_every_time(self, made: Handmade) -> None:
        assert snapshot_page(made.store, made.image) == snapshot_page(made.snapshot, made.image)

    def test_pictures_are_small_jpegs(self, page: Element) -> None:
        pictures = page.all("img")
        assert len(pictures) > 40
        for one in pictures:
            kind, _, data = one.attributes["src"].partition(";base64,")
            with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
                assert picture.size == (int(one.attributes["width"]), int(one.attributes["height"]))
                assert max(picture.size) <= 176
                # What is tiny already is kept to the pixel.
                assert kind == ("data:image/png" if max(picture.size) <= 80 else "data:image/jpeg")
            assert one.attributes["loading"] == "lazy"

    def test_memory_does_not_grow_with_the_ledger(
        self, made: Handmade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No query gives more rows than the page shows or a histogram has bins."""
        shutil.copytree(made.store, tmp_path / "out")
        for file in (tmp_path / "out" / "snapshots" / made.id / "ledger").iterdir():
            table = pq.read_table(file)
            pq.write_table(pa.concat_tables([table] * 200), file)
        sizes = []
        ask = Ledger.rows

        def counting(self: Ledger, query: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
            found = ask(self, query, values)
            sizes.append(len(found))
            return found

        monkeypatch.setattr(Ledger, "rows", counting)
        snapshot_page(tmp_path / "out", made.image)
        assert max(sizes) <= facts.FINE_BINS
        assert sum(size > 400 for size in sizes) == 0

    def test_an_empty_snapshot_still_has_a_page(self, made: Handmade, tmp_path: Path) -> None:
        shutil.copytree(made.store, tmp_path / "out")
        folder = tmp_path / "out" / "snapshots" / made.id
        for file in [*(folder / "ledger").iterdir(), *(folder / "captions").iterdir()]:
            pq.write_table(pq.read_table(file).slice(0, 0), file)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["funnel"] = {
            "rows_in": 0,
            "failed": 0,
            "kept": 0,
            "failures": {},
            "steps": [{**step, "in": 0, "out": 0, "rejected": 0} for step in manifest["funnel"]["steps"]],
        }
        (folder / "manifest.json").write_text(json.dumps({**manifest, "shards": [], "held_out": {}}))
        page = assert_inert(snapshot_page(folder))
        assert page.all("div", data_balance="yes")

    def test_a_folder_that_is_no_snapshot_is_one_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not a snapshot"):
            snapshot_page(tmp_path)


class TestHostileText:
    @pytest.fixture(scope="class")
    def hostile(self, tmp_path_factory: pytest.TempPathFactory) -> Handmade:
        # A lone surrogate cannot be stored in Parquet, so it cannot come from there.
        texts = [text.replace("\ud800", "") for text in HOSTILE]
        numbers = {number: texts[number % len(texts)] for number in range(80)}
        return make_snapshot(tmp_path_factory.mktemp("hostile"), captions=numbers, keys=numbers)

    def test_in_captions_and_keys(self, hostile: Handmade) -> None:
        for html in (snapshot_page(hostile.store, hostile.image), samples_page(hostile.store, hostile.image)):
            page = assert_inert(html)
            assert "<script>alert(1)</script>" in page.text  # it is shown, as text
            assert "49" not in {one.text for one in page.all("span", class_="clip")}
            assert "\x1b" not in html
            assert "\u202e" not in html
            assert len(html) < 3_000_000

    def test_in_recipes_reasons_and_addresses(self, made: Handmade, tmp_path: Path) -> None:
        for number, text in enumerate(text.replace("\x00", "") for text in HOSTILE[:6]):
            folder = tmp_path / f"{number}" / "snap"
            shutil.copytree(made.snapshot, folder)
            manifest = json.loads((folder / "manifest.json").read_text())
            provenance = json.loads((folder / "provenance.json").read_text())
            manifest["code_version"] = manifest["recipe"]["comment"] = text
            manifest["funnel"]["steps"][1]["threshold"] = text
            manifest["recipe"]["rules"].pop("words")
            for column in manifest["columns"]:
                column["unit"] = text
            provenance.update(host=text, command=text)
            provenance["inputs"][0]["address"] = text
            (folder / "manifest.json").write_text(json.dumps(manifest))
            (folder / "provenance.json").write_text(json.dumps(provenance))
            assert_inert(snapshot_page(folder, made.image, lineage=Node("run", text, text, [Node("artifact", text)])))

    def test_in_runs_and_tables(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path / "run", "distill", prompts=HOSTILE)
        run = json.loads((folder / "run.json").read_text())
        run["recipe"] = {"note": HOSTILE, HOSTILE[0]: HOSTILE[1]}
        run["name"] = HOSTILE[0]
        (folder / "run.json").write_text(json.dumps(run))
        (folder / "evaluation.json").write_text(json.dumps({HOSTILE[0]: {HOSTILE[1]: HOSTILE[2]}}))
        assert_inert(run_page(folder))
        table = Table(HOSTILE[0], [HOSTILE[1]], [[text] for text in HOSTILE], HOSTILE[2])
        assert_inert(combined_page(HOSTILE[0], runs=[folder], tables=[table], about=HOSTILE[1]))


class TestPictures:
    def test_found_in_raw_shards_then_in_the_snapshot(self, tmp_path: Path) -> None:
        made = make_snapshot(tmp_path)
        kept, dropped = made.first(verdict="kept"), made.first(verdict="rejected")

        def look(row: dict[str, Any]) -> bytes | None:
            with open_ledger(made.store) as ledger:
                return SnapshotImages(ledger)(row["shard"], row["key"], row["member"], row["index"])

        for row in (kept, dropped):
            assert look(row) == made.pictures[row["shard"], row["index"]]
        for path in made.raw.values():
            path.unlink()
        assert look(kept) == made.pictures[kept["shard"], kept["index"]]
        assert look(dropped) is None
        page = assert_inert(snapshot_page(made.store))
        assert "picture not found" in page.text

    def test_in_folders_and_parquet(self, made: Handmade, tmp_path: Path) -> None:
        row = made.first(verdict="kept")
        data = made.pictures[row["shard"], row["index"]]
        (tmp_path / "photos" / "sub").mkdir(parents=True)
        (tmp_path / "photos" / "sub" / "a.jpg").write_bytes(data)
        table = pa.table({"image": [{"bytes": b"no", "path": ""}] * 5 + [{"bytes": data, "path": ""}]})
        pq.write_table(table, tmp_path / "rows.parquet", row_group_size=4)
        for address, member, index in ((tmp_path / "photos", "sub/a.jpg", 0), (tmp_path / "rows.parquet", "", 5)):
            with open_ledger(made.store) as ledger:
                ledger.inputs["elsewhere"] = {"address": str(address)}
                assert SnapshotImages(ledger)("elsewhere", "", member, index) == data
                assert SnapshotImages(ledger)("elsewhere", "", "../../../etc/passwd", 99) is None

    def test_a_damaged_tar_still_gives_its_good_part(self, made: Handmade, tmp_path: Path) -> None:
        digest, path = next(iter(made.raw.items()))
        (tmp_path / "cut.tar").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        row = made.rows[0]
        with open_ledger(made.store) as ledger:
            ledger.inputs[digest] = {"digest": digest, "address": str(tmp_path / "cut.tar")}
            assert SnapshotImages(ledger)(digest, row["key"], row["member"], 0) == made.pictures[digest, 0]

    def test_only_the_bytes_that_were_judged_are_shown(self, made: Handmade) -> None:
        row = made.first(verdict="kept")
        other = encoded(draw("circle", "red", (100, 100), 1))
        assert row_thumbnail(lambda *_: other, row).problem == "changed since"
        assert row_thumbnail(lambda *_: None, row).problem == "not found"

        def broken(*_: Any) -> bytes:
            raise OSError("gone")

        assert row_thumbnail(broken, row).problem == "not found"

    @pytest.mark.parametrize("data", [b"", b"text", b"\xff\xd8\xff\xe0 cut", b"GIF89a"])
    def test_what_does_not_open(self, data: bytes) -> None:
        assert thumbnail(data).problem == "does not open"

    def test_modes_and_shapes(self) -> None:
        for mode in ("L", "LA", "P", "RGBA", "CMYK", "1", "I;16"):
            out = io.BytesIO()
            Image.new(mode, (300, 40)).save(out, "TIFF")
            found = thumbnail(out.getvalue())
            assert (found.width, found.problem) == (176, "")

    def test_a_bomb_is_not_unpacked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipelines.report.pictures.LARGEST_PIXELS", 1000)
        assert thumbnail(encoded(Image.new("RGB", (100, 100)))).problem == "too large to show"


class TestRuns:
    def test_a_distillation(self, made: Handmade, tmp_path: Path) -> None:
        teacher = make_run(tmp_path / "teacher", "train", made)
        student = make_run(tmp_path / "student", "distill", made, teacher)
        page = assert_inert(run_page(student, lineage=Node("artifact", "student tiny")))
        assert "Distillation run student" in page.all("h1")[0].text
        assert (
            "The student takes 4 steps where the teacher takes 20; 0.42 s a picture instead of 1.9 s, 4.5 times less"
            in page.text
        )
        drawings = page.all("figure", class_="drawing")
        assert len(drawings) == 8
        assert all(len(one.all("img")) == 2 for one in drawings)
        assert drawings[0].all("figcaption")[0].text == "a red circle"
        (table,) = page.all("section", id="evaluation")[0].all("table")
        assert "colour rate 97.5 % 96.0 %" in table.text
        assert "train, smoothed" in page.text
        assert "held out" in page.text
        labels = [svg.attributes["aria-label"] for svg in page.all("svg", class_="plot")]
        assert len(labels) == 2  # one for wide screens, one for phones
        assert "held out from" in labels[0]

    def test_losses_of_a_killed_and_resumed_run(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path / "run")
        lines = [
            {"step": 1, "loss": 3.0, "split": "train"},
            {"step": 2, "loss": 9.0, "split": "train"},
            {"step": 2, "loss": 2.0, "split": "train"},  # done again after the kill
            {"step": 3, "loss": float("nan"), "split": "train"},
            {"step": 3, "loss": 2.5, "split": "held_out"},
            {"note": "no loss"},
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "loss": 1.'
        (folder / "metrics.jsonl").write_text(text)
        from cluster.storage import Folder

        losses = read_losses(Folder(folder))
        assert list(losses.steps["train"]) == [1, 2, 3]
        assert list(losses.values["train"])[:2] == [3.0, 2.0]
        assert losses.not_finite == 1
        assert [line.name for line in loss_lines(losses)] == ["train", "held out"]
        assert "1 logged losses were not finite" in read_page(run_page(folder)).text

    def test_a_run_that_has_nothing_yet(self, tmp_path: Path) -> None:
        (tmp_path / "run.json").write_text('{"id": "r", "kind": "train"}')
        assert "This run logged no loss." in assert_inert(run_page(tmp_path)).text

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"no training run at .*run\.json is not there"):
            run_page(tmp_path)

    def test_samples_stay_in_their_folder(self, tmp_path: Path) -> None:
        from cluster.storage import Folder

        folder = make_run(tmp_path / "run", "distill")
        (tmp_path / "secret.png").write_bytes(encoded(Image.new("RGB", (8, 8)), "PNG"))
        entries = [{"prompt": "p", "file": "../../../secret.png", "steps": 4, "seconds": 1.0}, {"prompt": "p"}]
        (folder / "samples" / "student" / "samples.json").write_text(json.dumps(entries))
        grid = read_grid(Folder(folder))
        assert grid is not None
        drawn = [side[1] for prompt, side in grid.rows if prompt == "p"]
        assert [one.picture.problem for one in drawn if one] == ["not found", "not found"]

    def test_samples_that_were_timed_together(self, tmp_path: Path) -> None:
        from cluster.storage import Folder

        folder = make_run(tmp_path / "run", "distill")
        path = folder / "samples" / "student" / "samples.json"
        samples = [{"prompt": one["prompt"], "file": one["file"], "seed": 1} for one in json.loads(path.read_text())]
        path.write_text(json.dumps({"steps": 2, "seconds_per_image": 0.25, "samples": samples}))
        grid = read_grid(Folder(folder))
        assert grid is not None
        assert [(one.name, one.steps, one.seconds) for one in grid.painters] == [
            ("teacher", 20, 1.9),
            ("student", 2, 0.25),
        ]
        assert all(sides[1] and sides[1].seconds == 0.25 for _, sides in grid.rows)

    def test_prompts_that_both_drew_come_first_and_many_are_cut(self, tmp_path: Path) -> None:
        from cluster.storage import Folder

        folder = make_run(tmp_path / "run", "distill", prompts=[f"a red circle {n}" for n in range(40)])
        entries = json.loads((folder / "samples" / "student" / "samples.json").read_text())
        (folder / "samples" / "student" / "samples.json").write_text(json.dumps(entries[20:]))
        grid = read_grid(Folder(folder), most=10)
        assert grid is not None
        assert grid.prompts == 40
        assert [prompt for prompt, _ in grid.rows] == [f"a red circle {n}" for n in range(20, 30)]

    @pytest.mark.parametrize(
        ("said", "columns", "first"),
        [
            ({"colour_rate": 0.9}, ["", "value"], ["colour rate", "90.0 %"]),
            ({"a": {"fid": 12.5, "by": {"x": 1}}, "b": {"fid": 13}}, ["", "a", "b"], ["fid", 12.5, 13]),
            ([{"name": "x", "value": 1}], ["name", "value"], ["x", 1]),
        ],
    )
    def test_shapes_of_evaluations(self, said: Any, columns: list[str], first: list[Any]) -> None:
        table = evaluation_table(said)
        assert table is not None
        assert (table.columns, table.rows[0]) == (columns, first)

    def test_evaluations_of_no_known_shape_have_no_table(self) -> None:
        shapes: list[Any] = [None, {}, [], "text", [1]]
        for said in shapes:
            assert evaluation_table(said) is None


def test_the_whole_story(made: Handmade, tmp_path: Path) -> None:
    teacher = make_run(tmp_path / "teacher", "train", made)
    student = make_run(tmp_path / "student", "distill", made, teacher)
    html = combined_page(
        "Sluice demo",
        snapshot=made.store,
        images=made.image,
        runs=[teacher, student],
        tables=[Table("Planted flaws", ["flaw", "planted", "met"], [["byte duplicates", 40, 40]])],
        lineage=Node("artifact", "student tiny", "57"),
        tiles=[("80", "rows in")],
    )
    page = assert_inert(html)
    titles = [one.text for one in page.all("h1")]
    assert titles == ["Sluice demo", "Distillation run student", "Training run teacher", f"Snapshot {made.id[:12]}"]
    anchors = {one.attributes["id"] for one in page.all() if "id" in one.attributes}
    for link in page.all("a"):
        assert link.attributes["href"][1:] in anchors
    assert len([one.attributes["id"] for one in page.all() if "id" in one.attributes]) == len(anchors)
    assert _funnel(page)["near"][1] == made.counts()["near"]
