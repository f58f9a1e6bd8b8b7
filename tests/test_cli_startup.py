"""Starting the command costs under half a second, because no heavy library is imported before it is used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "torchvision", "ray", "transformers", "diffusers", "deepspeed", "open_clip", "faiss")
CPU_SECONDS_LIMIT = 0.5
IMPORT_CLI = "import pipelines.cli"
SHOW_HELP = """
import pipelines.cli
sys.argv = ["sluice", "--help"]
try:
    pipelines.cli.main()
except SystemExit as end:
    assert not end.code, end.code
"""
CPU_MEASURES = "import stages.decode, stages.text_quality, stages.hashing, stages.dedupe, stages.rules"


def measured(code: str, cwd: Path) -> tuple[float, list[str], str]:
    """(CPU seconds, heavy libraries loaded, what was printed) of `code` in a fresh interpreter started in `cwd`."""
    script = (
        f"import json, sys, time\nbegan = time.process_time()\n{code}\n"
        f"seconds = time.process_time() - began\n"
        f"print(json.dumps([seconds, [name for name in {HEAVY!r} if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed, _, last = done.stdout.rstrip().rpartition("\n")
    seconds, loaded = json.loads(last)
    return seconds, loaded, printed


@pytest.mark.parametrize("code", [IMPORT_CLI, SHOW_HELP], ids=["import", "help"])
def test_the_cli_starts_without_heavy_libraries(code: str, tmp_path: Path) -> None:
    _, loaded, _ = measured(code, tmp_path)
    assert loaded == []


def test_help_lists_the_commands_of_every_package(tmp_path: Path) -> None:
    _, _, printed = measured(SHOW_HELP, tmp_path)
    for command in ("curate", "select", "why", "train", "distill", "sample", "lineage", "report", "demo"):
        assert command in printed


def test_importing_the_cli_costs_under_half_a_second(tmp_path: Path) -> None:
    """CPU time, best of three: other work on the machine must not decide."""
    best = min(measured(IMPORT_CLI, tmp_path)[0] for _ in range(3))
    assert best < CPU_SECONDS_LIMIT, f"importing pipelines.cli takes {best:.2f} s of CPU; see python -X importtime"


def test_workers_of_cpu_measures_load_no_torch(tmp_path: Path) -> None:
    _, loaded, _ = measured(CPU_MEASURES, tmp_path)
    assert loaded == []
