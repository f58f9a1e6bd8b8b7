"""Every benchmark in this folder, one after another, and a table of the JSON lines they end with.

    python benchmarks/run_all.py --quick

Options are passed on. Exits with 1 where a claim does not hold, or a benchmark ends without its line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).resolve().parent
NOT_BENCHMARKS = {"harness.py", "run_all.py", "corpus.py", "processes.py", "curation_stages.py"}
KEYS = ("claim", "value", "unit", "limit", "peer", "ratio", "holds")


def final_line(output: str) -> dict[str, Any] | None:
    """The verdict in the last line of `output`, or None where there is none."""
    try:
        verdict = json.loads(output.rstrip().rpartition("\n")[2])
    except ValueError:
        return None
    return verdict if isinstance(verdict, dict) and set(KEYS) <= set(verdict) else None


def run(script: Path, options: list[str]) -> dict[str, Any]:
    """Run one benchmark, showing what it prints; its verdict, or one that says what went wrong."""
    # One thread unless the benchmark says otherwise: rates are per core.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [sys.executable, str(script), *options]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(f"  {line}", end="", flush=True)
        lines.append(line)
    status = process.wait()
    verdict = final_line("".join(lines))
    if verdict is None:
        problem = f"ended with status {status} and no verdict"
        return {**dict.fromkeys(KEYS, ""), "claim": problem, "value": 0, "ratio": None, "holds": False}
    # A benchmark that printed "holds" and then crashed has not shown anything.
    verdict["holds"] = bool(verdict["holds"]) and status == 0
    return verdict


def main() -> None:
    scripts = sorted(path for path in FOLDER.glob("*.py") if path.name not in NOT_BENCHMARKS)
    table = Table("benchmark", "claim", "value", "ratio", "limit", "peer", "holds", "seconds")
    broken = []
    for script in scripts:
        print(f"{script.stem}:", flush=True)
        began = time.monotonic()
        verdict = run(script, sys.argv[1:])
        ratio = "" if verdict["ratio"] is None else f"{verdict['ratio']:g}"
        value = f"{verdict['value']:g} {verdict['unit']}"
        if not verdict["holds"]:
            broken.append(script.stem)
        holds = "yes" if verdict["holds"] else "NO"
        seconds = f"{time.monotonic() - began:.0f}"
        table.add_row(script.stem, verdict["claim"], value, ratio, verdict["limit"], verdict["peer"], holds, seconds)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    if broken or not scripts:
        print(f"does not hold: {', '.join(broken)}" if broken else "no benchmark was found")
        sys.exit(1)


if __name__ == "__main__":
    main()
