"""A private PostgreSQL server for tests: its own folder, a free port, started and stopped by us alone."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


def programs() -> Path | None:
    """The folder of the newest PostgreSQL server programs here, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


@contextlib.contextmanager
def postgres(binaries: Path) -> Iterator[str]:
    """Start a server; gives the URL of its database "postgres". It refuses to run as root, so root becomes nobody."""
    folder = Path(tempfile.mkdtemp(prefix="sluice-pg-"))
    user = "nobody" if os.geteuid() == 0 else None
    if user:
        entry = pwd.getpwnam(user)
        os.chown(folder, entry.pw_uid, entry.pw_gid)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(*command: str) -> None:
        # The server inherits what pg_ctl has open: a pipe here would stay open as long as the server runs.
        with open(folder / "log.txt", "ab") as log:
            done = subprocess.run(command, user=user, cwd=folder, stdout=log, stderr=log, timeout=60)
        assert done.returncode == 0, f"{command}: {(folder / 'log.txt').read_text()}"

    data = str(folder / "data")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=40"
    try:
        run(
            str(binaries / "initdb"),
            "-D",
            data,
            "-U",
            "sluice",
            "--auth=trust",
            "--no-sync",
            "-E",
            "UTF8",
            "--locale=C",
        )
        run(str(binaries / "pg_ctl"), "-D", data, "-o", options, "-w", "start")
        try:
            yield f"postgresql://sluice@127.0.0.1:{port}/postgres"
        finally:
            run(str(binaries / "pg_ctl"), "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
