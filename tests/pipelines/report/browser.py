"""Open a page in a real Chromium and look at what happened: console, requests, sizes, and a screenshot.

Speaks the DevTools protocol over a pipe, so nothing listens on a port and no package is needed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking --disable-sync
    --no-first-run --disable-component-update --disable-default-apps --disable-extensions --metrics-recording-only
    --mute-audio --hide-scrollbars --disable-features=Translate,OptimizationHints,MediaRouter --remote-debugging-pipe
"""


class Browser:
    """A running Chromium with one page."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = send, receive
        self._rest, self._number = b"", 0
        self.events: list[Mapping[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = os.read(self._receive, 1 << 20)
            if not block:
                raise RuntimeError("chromium ended")
            self._rest += block
        first, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(first))

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file and wait until it has loaded."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.events.clear()
        self.ask("Page.navigate", url=path.absolute().as_uri())
        end = time.monotonic() + 60
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < end, "the page did not load in a minute"
            self.events.append(self._read())

    def evaluate(self, script: str) -> Any:
        said = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def broken_pictures(self) -> int:
        """How many of the page's pictures do not decode (lazy ones are fetched first)."""
        return int(
            self.evaluate(
                "(async () => { const all = [...document.images]; for (const one of all) one.loading = 'eager';"
                "const done = await Promise.allSettled(all.map(one => one.decode()));"
                "return done.filter(one => one.status != 'fulfilled').length; })()"
            )
        )

    def complaints(self) -> list[str]:
        """Errors and warnings on the console or in the browser's log."""
        found = []
        for event in self.events:
            said = event.get("params", {})
            if event.get("method") == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
                found.append(said["entry"]["text"])
            if event.get("method") == "Runtime.exceptionThrown" or (
                event.get("method") == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning")
            ):
                found.append(json.dumps(said))
        return found

    def requests(self) -> list[str]:
        """Addresses asked for, data URIs left out."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
            and not event["params"]["request"]["url"].startswith("data:")
        ]

    def screenshot(self, path: Path, whole: bool = True) -> None:
        shot = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browse(program: str) -> Iterator[Browser]:
    """Start Chromium with a profile of its own; end it, and only it, afterwards."""
    with tempfile.TemporaryDirectory(prefix="sluice-chromium-", ignore_cleanup_errors=True) as profile:
        to_child_read, to_child_write = os.pipe()
        from_child_read, from_child_write = os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4; a shell moves the pipes there without a fork hook.
        command = [program, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        shell = f'exec "$@" 3<&{to_child_read} 4>&{from_child_write}'
        process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(to_child_read, from_child_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_child_read)
        os.close(from_child_write)
        try:
            yield Browser(to_child_write, from_child_read)
        finally:
            os.close(to_child_write)
            os.close(from_child_read)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=20)
