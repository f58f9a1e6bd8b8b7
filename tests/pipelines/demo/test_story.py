"""The demo from its first command to its last, too short for good drawings."""

from __future__ import annotations

import json

import pytest


@pytest.mark.full
def test_the_whole_path_runs_and_every_row_is_accounted_for(sluice, tmp_path, ray_temp) -> None:
    short = ("--scenes", 120, "--teacher-steps", 20, "--student-steps", 4, "--judged", 8)
    told = sluice("demo", "--output", tmp_path / "demo", *short)
    findings = {one["what"]: one for one in json.loads((tmp_path / "demo" / "findings.json").read_text())}
    for what in ("corrupt files failed", "byte duplicates dropped", "rows accounted for in the funnel"):
        assert findings[what]["holds"] is True, what
    assert findings["distinct scenes dropped as duplicates"]["met"] == 0
    assert "teacher's shape_rate" in findings
    assert "00000.tar" in told.stdout  # the lineage tree reaches the raw shard
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "What was planted, and what was found" in page
    assert page.count("data:image/jpeg;base64,") > 20
