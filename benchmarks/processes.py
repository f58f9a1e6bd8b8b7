"""What a command and everything it starts cost: CPU time, wall time and memory, daemons and orphans included.

Linux only: orphans come to this process (PR_SET_CHILD_SUBREAPER), so that none escapes. CPU time is looked up in /proc
five times a second and the last figure of every process is summed: getrusage's sum over children misses Ray's workers
(with it, 6,000 pictures on Ray seemed to cost less than the kernels alone). Memory is the proportional set size (PSS)
in /proc/*/smaps_rollup, in which shared pages are shared out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36
SAMPLE_S = 0.2
MEMORY_EVERY = 5  # samples
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
    began = time.monotonic()
    process = subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watch = _Watch()
    watch.start()
    try:
        output, _ = process.communicate(timeout=timeout_s)
        wall_s = time.monotonic() - began
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        _reap_orphans()
        watch.stop.set()
        watch.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}\n{output[-4000:]}")
    return Cost(sum(watch.cpu_s.values()), wall_s, watch.peak_pss_mb, output)


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


class _Watch(threading.Thread):
    """Looks at all descendants of this process until told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.cpu_s: dict[tuple[int, float], float] = {}
        self.peak_pss_mb = 0.0

    def run(self) -> None:
        here = psutil.Process()
        samples = 0
        while not self.stop.wait(SAMPLE_S):
            processes = here.children(recursive=True)
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    self.cpu_s[process.pid, process.create_time()] = times.user + times.system
            if samples % MEMORY_EVERY == 0:
                self.peak_pss_mb = max(self.peak_pss_mb, sum(_pss_mb(process.pid) for process in processes))
            samples += 1


def _pss_mb(pid: int) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0
