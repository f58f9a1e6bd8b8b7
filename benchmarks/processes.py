"""What a command and everything it starts cost: CPU time, wall time and memory, daemons and orphans included.

Linux only: orphans come to this process (PR_SET_CHILD_SUBREAPER), so their CPU time is counted when they end, and
memory is the proportional set size (PSS) in /proc/*/smaps_rollup, in which shared pages are shared out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36
SAMPLE_S = 0.5
ORPHANS_S = 30.0


@dataclass(frozen=True)
class Cost:
    """cpu_s: user and system seconds of the whole process tree. peak_pss_mb: its largest sum of PSS that was seen."""

    cpu_s: float
    wall_s: float
    peak_pss_mb: float
    output: str


def cost_of(command: Sequence[str], environment: Mapping[str, str] | None = None, timeout_s: float = 1800) -> Cost:
    """Run `command` to its end and its orphans to theirs. Raises RuntimeError with its output where it fails."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    process = subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak = [0.0]
    stop = threading.Event()
    watch = threading.Thread(target=_watch_memory, args=(peak, stop), daemon=True)
    watch.start()
    try:
        output, _ = process.communicate(timeout=timeout_s)
        wall_s = time.monotonic() - began
    finally:
        stop.set()
        watch.join()
        if process.poll() is None:
            process.kill()
            process.wait()
        _reap_orphans()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}\n{output[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu_s, wall_s, peak[0], output)


def _reap_orphans() -> None:
    """Wait for what the command left behind; end what does not end by itself."""
    deadline = time.monotonic() + ORPHANS_S
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid:
            continue
        if time.monotonic() > deadline:
            for orphan in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    orphan.kill()
        time.sleep(0.05)


def _watch_memory(peak: list[float], stop: threading.Event) -> None:
    while not stop.wait(SAMPLE_S):
        peak[0] = max(peak[0], sum(_pss_mb(process.pid) for process in psutil.Process().children(recursive=True)))


def _pss_mb(pid: int) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0
