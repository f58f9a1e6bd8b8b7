"""Progress with rate and time left: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

PLAIN_EVERY_S = 10.0


def say(text: str) -> None:
    """One line for the person at the terminal, on standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Counts up to `total` things called `unit`. Silent where `quiet`.

    with Progress("decode, hash", total=4, unit="shards") as progress:
        progress.advance(1, note="640 rows")
    """

    def __init__(self, title: str, total: int, unit: str = "shards", quiet: bool = False) -> None:
        self.title, self.total, self.unit, self.quiet = title, total, unit, quiet
        self.done = 0
        self.rows = 0
        self.spent: dict[str, float] = {}
        self.live = sys.stderr.isatty() and not quiet

    def __enter__(self) -> Progress:
        self.started = self.last_said = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.quiet:
            return
        line = self._line(time.monotonic() - self.started, finished=True)
        print(f"\r\x1b[K{line}" if self.live else line, file=sys.stderr, flush=True)

    def advance(self, count: int = 1, rows: int = 0, spent: Mapping[str, float] | None = None) -> None:
        """spent: what the work has cost, by name (requests, tokens, USD); shown as sums."""
        self.done += count
        self.rows += rows
        for name, value in (spent or {}).items():
            self.spent[name] = self.spent.get(name, 0) + value
        now = time.monotonic()
        if self.quiet or now - self.last_said < (0.2 if self.live else PLAIN_EVERY_S):
            return
        self.last_said = now
        line = self._line(now - self.started)
        print(f"\r\x1b[K{line}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def _line(self, seconds: float, finished: bool = False) -> str:
        rate = f", {self.rows / seconds:,.0f} rows/s" if self.rows and seconds > 0 else ""
        spent = "".join(
            f", {name} {value:,.2f}" if name == "USD" else f", {value:,.0f} {name}"
            for name, value in self.spent.items()
            if value
        )
        left = "" if finished or not self.done else f", {self._left(seconds)} left"
        return f"  {self.title}: {self.done:,} of {self.total:,} {self.unit}{rate}{spent}, {seconds:.1f} s{left}"

    def _left(self, seconds: float) -> str:
        remaining = seconds / self.done * (self.total - self.done)
        return f"{remaining:.0f} s" if remaining < 120 else f"{remaining / 60:.0f} min"
