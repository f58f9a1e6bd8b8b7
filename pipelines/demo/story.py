"""The demo: every command of the path on a made-up world, each printed as a user would type it.

Started again on the same folder it goes on from what is finished, like the commands it is made of.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.demo.audit import Finding, audit
from pipelines.progress import say
from pipelines.snapshot import Snapshot, open_snapshot

RECIPES = Path(__file__).parent / "recipes"
COLOUR_RATE_ASKED = 0.90
SHAPE_RATE_ASKED = 0.75
KEPT_BY_STUDENT_ASKED = 0.90
PROMPT_SEED = 7  # of the prompts that are judged; the world has another one


class DemoError(ValueError):
    """A command of the demo ended badly; its own words stand above."""


@dataclass
class Story:
    """The demo's settings, and the steps that tell it."""

    folder: Path
    scenes: int
    seed: int
    teacher_steps: int
    student_steps: int
    judged: int
    workers: int
    seconds: dict[str, float] = field(default_factory=dict)

    def tell(self) -> None:
        started = time.monotonic()
        os.environ.setdefault("SLUICE_CATALOG", f"sqlite:///{self.folder}/catalog.db")
        snapshot = self.curated(self.world())
        findings = audit(snapshot, self.folder / "raw" / "truth.parquet")
        say("\nWas every planted flaw met?\n" + "\n".join(f"  {finding}" for finding in findings))
        teacher = self.trained(snapshot)
        student = self.distilled(snapshot, teacher)
        evaluation = self.evaluated(teacher, student)
        page = self.report(snapshot, teacher, student, findings, evaluation)
        say(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes: " + self._spent())
        self.sluice("lineage", "trace", str(student / "model"))
        self._why(snapshot)
        print(f"\nreport    {page}\nnext      open it in a browser, or: sluice lineage impact {snapshot.id[:12]}")

    # --- chapters ----------------------------------------------------------------------------------------------------

    def world(self) -> Path:
        from pipelines.demo.world import make_world

        raw = self.folder / "raw"
        if not (raw / "truth.parquet").exists():
            say(f"Drawing a world of {self.scenes:,} scenes with planted flaws in {raw}")
            began = time.monotonic()
            summary = make_world(raw, scenes=self.scenes, seed=self.seed, shard_size=500)
            self.seconds["world"] = time.monotonic() - began
            say("  " + ", ".join(f"{count:,} {kind}" for kind, count in summary.counts.items()))
        return raw

    def curated(self, raw: Path) -> Snapshot:
        output = self.folder / "curated"
        self.sluice(
            "curate", str(RECIPES / "curate.yaml"), "--input", f"{raw}/*.tar", "--output", str(output),
            "--workers", str(self.workers), chapter="curate",
        )  # fmt: skip
        return open_snapshot(str(output))

    def trained(self, snapshot: Snapshot) -> Path:
        run = self.folder / "teacher"
        self.sluice(
            "train", str(RECIPES / "train.yaml"), "--data", snapshot.folder.url, "--output", str(run),
            *self._steps(self.teacher_steps), chapter="train",
        )  # fmt: skip
        return run

    def distilled(self, snapshot: Snapshot, teacher: Path) -> Path:
        run = self.folder / "student"
        self.sluice(
            "distill", str(RECIPES / "distill.yaml"), "--teacher", str(teacher), "--data", snapshot.folder.url,
            "--output", str(run), *self._steps(self.student_steps), chapter="distil",
        )  # fmt: skip
        return run

    def evaluated(self, teacher: Path, student: Path) -> dict[str, Any]:
        """Draw the same prompts with both, and read the pixels: never the CLIP that filtered the training data."""
        from pipelines.demo.world import prompts

        asked = prompts(self.judged, PROMPT_SEED)
        listed = self.folder / "prompts.txt"
        listed.write_text("".join(f"{prompt}\n" for prompt, _ in asked))
        evaluation = {}
        for name, run in (("teacher", teacher), ("student", student)):
            drawn = student / "samples" / name
            self.sluice("sample", str(run), "--prompts", str(listed), "--output", str(drawn), chapter=f"draw ({name})")
            evaluation[name] = judge_drawings(drawn, [scene for _, scene in asked])
        (student / "evaluation.json").write_text(json.dumps(evaluation, indent=1))
        say("\nThe drawings, judged by reading their pixels")
        for name, rates in evaluation.items():
            say(f"  {name:8s} " + ", ".join(f"{key} {value:.3g}" for key, value in rates.items() if value is not None))
        return evaluation

    def report(
        self, snapshot: Snapshot, teacher: Path, student: Path, findings: list[Finding], evaluation: dict[str, Any]
    ) -> Path:
        from pipelines.lineage.catalog import open_catalog
        from pipelines.lineage.questions import trace
        from pipelines.lineage.tree import build
        from pipelines.report.pages import combined_page
        from pipelines.report.runs import Table

        verdicts = [*findings, *rate_findings(evaluation)]
        (self.folder / "findings.json").write_text(json.dumps([one.to_json() for one in verdicts], indent=1))
        rows = [[one.what.strip(), *_shown(one)] for one in verdicts]
        page = self.folder / "report.html"
        funnel = snapshot.manifest["funnel"]
        tiles = [
            (f"{funnel['rows_in']:,}", "rows in"),
            (f"{funnel['kept']:,}", "kept"),
            (f"{evaluation['teacher']['colour_rate']:.1%}", "teacher: colours right"),
            (f"{evaluation['student']['colour_rate']:.1%}", "student: colours right"),
        ]
        page.write_text(
            combined_page(
                "From raw shards to a student that draws",
                snapshot=snapshot.folder.url,
                runs=[str(teacher), str(student)],
                tables=[Table("What was planted, and what was found", ["check", "figure", "asked", "verdict"], rows)],
                lineage=build(trace(open_catalog(None), str(student / "model"))),
                tiles=tiles,
            )
        )
        return page

    # --- helpers -----------------------------------------------------------------------------------------------------

    def sluice(self, *arguments: str, chapter: str = "") -> None:
        """Run a command as a user would, with its own output on this terminal. Raises DemoError if it fails."""
        say(f"\n$ sluice {shlex.join(arguments)}")
        began = time.monotonic()
        # -P: a folder called `pipelines` in the working directory must not stand in for ours.
        command = [sys.executable, "-P", "-c", "from pipelines.cli import main; main()", *arguments]
        status = subprocess.run(command, check=False).returncode
        if status:
            raise DemoError(f"`sluice {arguments[0]}` ended with status {status}; start `sluice demo` again to go on")
        if chapter:
            self.seconds[chapter] = time.monotonic() - began

    def _steps(self, steps: int) -> tuple[str, ...]:
        workers = ("--set", f"workers={self.workers}")
        return (*workers, "--set", f"steps={steps}") if steps else workers

    def _why(self, snapshot: Snapshot) -> None:
        """One dropped sample's story, as `sluice why` tells it."""
        for table in snapshot.tables("ledger", ["uid", "rule"]):
            for row in table.to_pylist():
                if row["rule"] == "near":
                    self.sluice("why", row["uid"], "--snapshot", snapshot.folder.url)
                    return

    def _spent(self) -> str:
        return ", ".join(f"{chapter} {seconds:.0f} s" for chapter, seconds in self.seconds.items())


def judge_drawings(folder: Path, scenes: list[Any]) -> dict[str, float]:
    """Shares of drawings with the asked-for colours, shapes and relation, and seconds a picture."""
    import numpy as np
    from PIL import Image

    from pipelines.demo.checker import judge

    drawn = json.loads((folder / "samples.json").read_text())
    verdicts = []
    for sample, scene in zip(drawn["samples"], scenes, strict=True):
        with Image.open(folder / sample["file"]) as picture:
            verdicts.append(judge(np.asarray(picture.convert("RGB")), scene))
    related = [verdict.relation_ok for verdict in verdicts if verdict.relation_ok is not None]
    return {
        "colour_rate": float(np.mean([verdict.colour_ok for verdict in verdicts])),
        "shape_rate": float(np.mean([verdict.shape_ok for verdict in verdicts])),
        "count_rate": float(np.mean([verdict.count_ok for verdict in verdicts])),
        "relation_rate": float(np.mean(related)) if related else None,
        "everything_right": float(np.mean([verdict.all_ok for verdict in verdicts])),
        "steps": drawn["steps"],
        "seconds_per_image": drawn["seconds_per_image"],
    }


def rate_findings(evaluation: dict[str, Any]) -> list[Finding]:
    """The rates that the demo promises, of the teacher and of the student beside it."""
    teacher, student = evaluation["teacher"], evaluation["student"]
    lines = []
    for rate, asked in (("colour_rate", COLOUR_RATE_ASKED), ("shape_rate", SHAPE_RATE_ASKED)):
        wanted = f"at least {asked:.0%}"
        lines.append(Finding(f"teacher's {rate}", figure=teacher[rate], asked=wanted, holds=teacher[rate] >= asked))
        kept = student[rate] / teacher[rate] if teacher[rate] else 0.0
        wanted = f"at least {KEPT_BY_STUDENT_ASKED:.0%} of the teacher's"
        lines.append(
            Finding(f"student's {rate}", figure=student[rate], asked=wanted, holds=kept >= KEPT_BY_STUDENT_ASKED)
        )
    return lines


def _shown(finding: Finding) -> list[str]:
    figure = f"{finding.figure:.4f}" if finding.figure is not None else f"{finding.met:,} of {finding.planted:,}"
    return [figure, finding.asked, {True: "holds", False: "falls short", None: ""}[finding.holds]]
