"""What every benchmark shares: options, interleaved timing, and the one JSON line it ends with.

A benchmark checks that results are right before it times anything, and ends by calling `conclude`. Times are CPU
seconds of this process over all its threads, the least of several rounds in which the contestants take turns: other
work on the machine lengthens a round, never shortens one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, NoReturn


def arguments(doc: str | None, **more: str) -> argparse.Namespace:
    """The options every benchmark takes; `doc` is the script's docstring. more: options of its own and their help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller case that ends in under a minute")
    for name, text in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=text)
    return parser.parse_args()


def machine(*packages: str) -> str:
    """One line that says what was measured on: processor kind, cores, Python and the versions of `packages`."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def least_cpu_seconds(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU seconds of each contestant: the least of `rounds`, taking turns, after one untimed turn each."""
    for run in contestants.values():
        run()
    least = dict.fromkeys(contestants, float("inf"))
    for _ in range(rounds):
        for name, run in contestants.items():
            began = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - began)
    return least


def core_hours_per_million(samples_per_second: float) -> float:
    """What a million samples cost on one core."""
    return 1e6 / samples_per_second / 3600


def conclude(
    *, claim: str, value: float, unit: str, limit: str, peer: str, ratio: float | None, holds: bool, **more: Any
) -> NoReturn:
    """Print the final JSON line and exit: 0 where the claim holds, 1 where it does not.

    claim: one sentence. value, unit: what was measured. limit: what it must reach. peer: what it is held against, with
    the peer's own figure. ratio: value over the peer's, more is better; None where there is no peer.
    """
    line = {
        "claim": claim,
        "value": float(f"{value:.4g}"),
        "unit": unit,
        "limit": limit,
        "peer": peer,
        "ratio": None if ratio is None else float(f"{ratio:.3g}"),
        "holds": bool(holds),
        **more,
    }
    print(json.dumps(line, ensure_ascii=False), flush=True)
    sys.exit(0 if holds else 1)
