"""What every test stands on: a home, a catalog and a Ray folder of its own, and honest skips.

No test reads or writes the user's home, catalog or running Ray cluster. Under pytest-xdist each worker process has its
own session folder and so its own Ray instance, started only when a test asks for it: `make test` hands out whole files
(`--dist loadfile`), so tests of one file share an instance and there are at most as many instances as workers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
IN_CI = os.environ.get("CI", "").lower() == "true"

# Set before any test imports torch or ray, and inherited by every process that a test starts.
DEFAULT_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # two test workers on two cores: threads would only fight, and sums would differ by machine
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(1 << 30),  # several instances may stand side by side
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Compiled DeepSpeed ops stay where they are although HOME moves: building them takes a minute.
    "TORCH_EXTENSIONS_DIR": str(Path.home() / ".cache" / "torch_extensions"),
}
for _name, _value in DEFAULT_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
for _name in ("RAY_ADDRESS", "SLUICE_CATALOG"):
    os.environ.pop(_name, None)


# --- programs that are not Python packages ---------------------------------------------------------------------------


def find_postgres() -> Path | None:
    """The folder with this machine's newest PostgreSQL server programs, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


def find_chromium() -> Path | None:
    """A Chromium browser, or None."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return Path(found) if found else None


PROGRAMS: dict[str, tuple[Callable[[], Path | None], str]] = {
    "postgres": (find_postgres, "no PostgreSQL server program (initdb) here: install the package postgresql"),
    "browser": (find_chromium, "no chromium here: install the package chromium"),
}


def program(marker: str) -> Path:
    """Where the program of a marker is. Where it is missing the test skips, with the reason; in CI it fails."""
    find, reason = PROGRAMS[marker]
    found = find()
    if found is None:
        if IN_CI:
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return found


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked postgres or browser asks for its program before any of its fixtures does."""
    for marker in PROGRAMS:
        if item.get_closest_marker(marker):
            program(marker)


@pytest.fixture(scope="session")
def postgres_programs() -> Path:
    """The folder of initdb, pg_ctl and the others."""
    return program("postgres")


@pytest.fixture(scope="session")
def chromium() -> Path:
    """A Chromium browser."""
    return program("browser")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a session in which no test passed is a failure, even if all of them were merely skipped."""
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    is_worker = hasattr(session.config, "workerinput")
    collecting_only = session.config.option.collectonly
    judged = IN_CI and exitstatus == 0 and reporter and not is_worker and not collecting_only
    if judged and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def session_folder() -> Iterator[Path]:
    """A short-named folder for this process: home, catalog and Ray's sockets for fixtures wider than one test.

    Short, because Ray puts unix sockets about 65 characters below its temporary folder and the kernel allows 107 in
    all; pytest's own temporary folders are too long for that.
    """
    folder = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp" if os.access("/tmp", os.W_OK) else None))
    with pytest.MonkeyPatch.context() as patch:
        _isolate(patch, folder)
        # Ray looks here for its sessions, and for a running cluster to join: nobody else's can be found.
        patch.setenv("RAY_TMPDIR", str(folder))
        yield folder
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _own_home(session_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a home and a catalog of its own; fixtures of wider scope share the session's."""
    _isolate(monkeypatch, Path(tempfile.mkdtemp(prefix="test-", dir=session_folder)))


def _isolate(patch: pytest.MonkeyPatch, folder: Path) -> None:
    home = folder / "home"
    home.mkdir()
    patch.setenv("HOME", str(home))
    patch.setenv("SLUICE_CATALOG", f"sqlite:///{folder}/catalog.db")


@pytest.fixture(scope="session")
def ray_temp(session_folder: Path) -> Path:
    """The short folder that Ray instances of this process keep their sessions and sockets in (also in RAY_TMPDIR)."""
    return session_folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real photographs and captions that are not part of the repository; the test skips where they are absent."""
    folder = Path(os.environ.get("SLUICE_SHARED_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set SLUICE_SHARED_DATA to the folder that holds flickr8k/ and others")
    return folder


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sluice() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the installed console script: `sluice("curate", recipe, "--output", out, cwd=folder)`.

    Raises AssertionError with everything the command printed unless it ends with the status asked for (0 by default).
    """
    program = Path(sys.executable).parent / "sluice"

    def run(
        *arguments: str | os.PathLike[str],
        cwd: Path | None = None,
        status: int | None = 0,
        timeout: float = 600,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        command = [str(program), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout
        )
        assert status is None or done.returncode == status, (
            f"{' '.join(command)} ended with {done.returncode}, not {status}\n{done.stdout}\n{done.stderr}"
        )
        return done

    return run
