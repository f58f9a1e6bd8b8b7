"""Whatever is killed: workers every few seconds through a whole run on Ray, and the driver at random moments.

    python benchmarks/kills.py --quick

A made-up world with planted duplicates is curated once in one process, undisturbed. Then

    workers   the same on Ray, every barrier judged in parts, while a random worker process is killed outright every few
              seconds from beginning to end
    driver    the same in one process and in parts, killed outright at a random moment and started again, many times

Each must end in the same snapshot id, and no file that a killed driver had finished may be written a second time: only
what was in flight is done again.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from harness import arguments, conclude, machine
from pipelines.demo.world import make_world
from pipelines.snapshot import open_snapshot

PAUSE_S = 3.0
RECIPE: dict[str, Any] = {
    "stages": {"decode": {}, "text": {"type": "text_quality"}, "hash": {"type": "perceptual_hash"}},
    "rules": {
        "short_side": {"column": "decode.short_side", "at_least": 64},
        "caption": {"column": "text.flaw", "is_null": True},
        "exact": {"type": "exact_duplicates"},
        "near": {"type": "near_duplicates"},
    },
}
# The command, with parts and inputs made small enough that every task of a large run is one here.
COMMAND = """
import pipelines.barriers, pipelines.runner
pipelines.barriers.PART_ROWS = {part_rows}
pipelines.runner.SMALL_INPUT_BYTES = 0
from pipelines.cli import main
main()
"""


def curate(folder: Path, output: str, *options: str, part_rows: int = 200) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", COMMAND.format(part_rows=part_rows), "curate", str(folder / "recipe.yaml")]
    environment = {**os.environ, "SLUICE_CATALOG": f"sqlite:///{folder / output}.db", "RAY_TMPDIR": str(folder)}
    with open(folder / f"{output}.log", "ab") as log:
        return subprocess.Popen(
            [*command, "--output", str(folder / output), *options], stdout=log, stderr=log, env=environment, cwd=folder
        )


def ended_well(process: subprocess.Popen[bytes], folder: Path, output: str) -> str:
    """The snapshot's id. Raises RuntimeError with the end of the log where the run failed."""
    if process.wait() != 0:
        raise RuntimeError(
            f"the run ended with {process.returncode}:\n{(folder / output).with_suffix('.log').read_text()[-3000:]}"
        )
    return open_snapshot(str(folder / output)).id


def finished_units(output: Path) -> dict[str, int]:
    """Every finished unit and its time of change. Judging's files are finished once their task's record is there."""
    units = (path for path in output.glob("units/**/*") if path.is_file() and not path.name.startswith("."))
    judging = output / "units" / "judge"
    done = (path for path in units if path.suffix == ".json" or judging not in path.parents)
    return {str(path): path.stat().st_mtime_ns for path in done if path.name != "fingerprints.json"}


def kill_workers(folder: Path, rng: random.Random) -> tuple[str, int]:
    """(snapshot id, workers killed) of a run on Ray that loses a worker every PAUSE_S seconds."""
    process = curate(folder, "workers", "--workers", "2")
    killed, pause = 0, 0.0
    while process.poll() is None:
        time.sleep(0.1)
        pause += 0.1
        if pause < PAUSE_S:
            continue
        found = []
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                title = " ".join(child.cmdline())
            except psutil.Error:
                continue
            # The actors of the run itself: Ray does not outlive the loss of its own agents.
            if title.startswith("ray::") and "MapBatches" in title:
                found.append(child)
        if found:
            pause = 0.0
            victim = rng.choice(found)
            print(f"  killed {' '.join(victim.cmdline())[:60]!r}", flush=True)
            victim.send_signal(signal.SIGKILL)
            killed += 1
    return ended_well(process, folder, "workers"), killed


def kill_driver(folder: Path, number: int, moment_s: float) -> tuple[str, int, int]:
    """(snapshot id, units finished when the driver was killed, those of them that were written again)."""
    output = f"driver{number}"
    process = curate(folder, output, "--local")
    time.sleep(moment_s)
    process.kill()
    process.wait()
    before = finished_units(folder / output)
    # The second run clears what judging left: look at it just before.
    again = curate(folder, output, "--local")
    seen: dict[str, int] = {}
    while again.poll() is None:
        seen.update(finished_units_quietly(folder / output))
        time.sleep(0.05)
    snapshot = ended_well(again, folder, output)
    rewritten = sum(seen.get(path, changed) != changed for path, changed in before.items())
    return snapshot, len(before), rewritten


def finished_units_quietly(output: Path) -> dict[str, int]:
    try:
        return finished_units(output)
    except FileNotFoundError:  # a file went while we looked
        return {}


def main() -> None:
    options = arguments(__doc__, seed="of the moments and the victims; another one each run if not given")
    seed = int(options.seed) if options.seed else random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)
    print(machine("ray"), f"seed {seed}", flush=True)
    scenes, moments = (250, 3) if options.quick else (1000, 20)
    with tempfile.TemporaryDirectory(prefix="sl-") as name:
        folder = Path(name)
        make_world(folder / "world", scenes=scenes, seed=0, shard_size=50)
        recipe = {**RECIPE, "input": {"url": str(folder / "world" / "*.tar")}}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))

        began = time.monotonic()
        whole = ended_well(curate(folder, "whole", "--local", part_rows=10**6), folder, "whole")
        print(f"undisturbed, one process, one part: {whole} in {time.monotonic() - began:.1f} s", flush=True)
        began = time.monotonic()
        in_parts = ended_well(curate(folder, "parts", "--local"), folder, "parts")
        seconds = time.monotonic() - began
        print(f"undisturbed, one process, in parts: {in_parts} in {seconds:.1f} s", flush=True)

        outcomes = [in_parts]
        redone = 0
        for number in range(moments):
            moment = rng.uniform(0.0, seconds)
            snapshot, units, rewritten = kill_driver(folder, number, moment)
            outcomes.append(snapshot)
            redone += rewritten
            print(
                f"driver killed after {moment:5.2f} s, {units:4d} units finished: {snapshot}, {rewritten} redone",
                flush=True,
            )
        snapshot, killed = kill_workers(folder, rng)
        outcomes.append(snapshot)
        print(f"{killed} workers killed: {snapshot}", flush=True)
    same = sum(outcome == whole for outcome in outcomes)
    conclude(
        claim="killed workers and killed drivers leave the snapshot of an undisturbed run",
        value=same,
        unit=f"of {len(outcomes)} runs with its id",
        limit=f"all; 0 finished units written again; at least {1 if options.quick else 5} workers killed",
        peer="none: the same run undisturbed",
        ratio=None,
        holds=same == len(outcomes) and redone == 0 and killed >= (1 if options.quick else 5),
        driver_kills=moments,
        worker_kills=killed,
        units_redone=redone,
        seed=seed,
    )


if __name__ == "__main__":
    main()
