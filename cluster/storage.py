"""One way to reach files wherever they lie: any filesystem that pyarrow can open, addressed by a URL or a local path.

A `Folder` reads, lists and writes below one address. Writes are whole and atomic: on a local disk a file is written
aside, flushed to the disk and renamed; on an object store one PUT makes it appear. So a file that exists is complete,
and a unit of work is finished exactly when its last file exists.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs

# Files for an object store are made whole before they are sent: in memory up to this size, else on the local disk.
MEMORY_BYTES = 64 << 20
LEASE_FILE = "lease.json"
LEASE_BEAT_S = 5.0
LEASE_STALE_S = 30.0


def resolve(url: str | os.PathLike[str]) -> tuple[pafs.FileSystem, str]:
    """The filesystem and the path inside it for a URL ("s3://bucket/x", "file:///x") or a local path."""
    text = os.fspath(url)
    if re.match(r"^[a-zA-Z][a-zA-Z0-9+.-]*://", text):
        filesystem, path = pafs.FileSystem.from_uri(text)
        return filesystem, path.rstrip("/")
    return pafs.LocalFileSystem(), str(Path(text).absolute())


def absolute(url: str | os.PathLike[str]) -> str:
    """The same address, independent of the working directory (workers have another one than the driver)."""
    text = os.fspath(url)
    return text.rstrip("/") if "://" in text else str(Path(text).expanduser().absolute())


def natural_key(name: str) -> list[Any]:
    """Sort key under which 9.tar comes before 10.tar."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class FileEntry:
    """One file below a folder: its path relative to the folder, size and time of last change (ns; 0 if unknown)."""

    path: str
    size_bytes: int
    mtime_ns: int

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


class Folder:
    """A folder on some filesystem. Paths given to its methods are relative to it and use "/"."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = absolute(url)
        self.filesystem, self.root = resolve(self.url)
        self.is_local = isinstance(self.filesystem, pafs.LocalFileSystem)

    def __truediv__(self, path: str) -> Folder:
        return Folder(f"{self.url}/{path}")

    def __reduce__(self) -> tuple[type[Folder], tuple[str]]:
        return Folder, (self.url,)

    def at(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def address(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url

    def exists(self, path: str = "") -> bool:
        return self.filesystem.get_file_info(self.at(path)).type != pafs.FileType.NotFound

    def is_file(self, path: str = "") -> bool:
        return self.filesystem.get_file_info(self.at(path)).type == pafs.FileType.File

    def files(self, path: str = "", pattern: str = "*", recursive: bool = True) -> list[FileEntry]:
        """Files below `path` whose name matches `pattern`, in natural order; none where there is no such folder."""
        found = [entry for entry in self._entries(path, recursive) if fnmatch.fnmatch(entry.name, pattern)]
        return sorted(found, key=lambda entry: natural_key(entry.path))

    def _entries(self, path: str, recursive: bool) -> Iterator[FileEntry]:
        if self.is_local:
            # Links to folders are not followed: they may lead round in a circle, or out.
            for where, folders, names in os.walk(self.at(path)):
                folders[:] = folders if recursive else []
                for name in names:
                    with contextlib.suppress(OSError):
                        info = os.stat(f"{where}/{name}")
                        if stat.S_ISREG(info.st_mode):
                            relative = os.path.relpath(f"{where}/{name}", self.root)
                            yield FileEntry(relative, info.st_size, info.st_mtime_ns)
            return
        selector = pafs.FileSelector(self.at(path), recursive=recursive, allow_not_found=True)
        for info in self.filesystem.get_file_info(selector):
            if info.type == pafs.FileType.File:
                yield FileEntry(info.path[len(self.root) :].lstrip("/"), info.size, info.mtime_ns or 0)

    def open(self, path: str) -> pa.NativeFile:
        """A seekable stream over a file. Raises FileNotFoundError."""
        return self.filesystem.open_input_file(self.at(path))

    def read(self, path: str) -> bytes:
        with self.open(path) as stream:
            return stream.read()

    def read_json(self, path: str) -> Any:
        return json.loads(self.read(path))

    def write(self, path: str, content: bytes | str) -> None:
        data = content.encode() if isinstance(content, str) else content
        self.write_with(path, lambda stream: stream.write(data))

    def write_json(self, path: str, value: Any) -> None:
        self.write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def write_with(self, path: str, fill: Callable[[IO[bytes]], Any]) -> None:
        """Create `path` whole: `fill(stream)` writes it; no reader ever sees a part of it."""
        if not self.is_local:
            # Closing an upload completes it, also after an error: what is written has to be whole before it begins.
            with tempfile.SpooledTemporaryFile(MEMORY_BYTES) as whole:
                fill(whole)  # type: ignore[arg-type]
                whole.seek(0)
                with self.filesystem.open_output_stream(self.at(path)) as stream:
                    shutil.copyfileobj(whole, stream, 1 << 20)
            return
        target = Path(self.at(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with open(aside, "wb") as stream:
                fill(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)

    def link(self, source: str, target: str) -> None:
        """Make `target` the same file as `source` (a hard link where the disk has them, else a copy)."""
        if not self.is_local:
            self.filesystem.copy_file(self.at(source), self.at(target))
            return
        destination = Path(self.at(target))
        destination.parent.mkdir(parents=True, exist_ok=True)
        aside = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            os.link(self.at(source), aside)
        except OSError:
            self.filesystem.copy_file(self.at(source), str(aside))
        os.replace(aside, destination)

    def delete(self, path: str) -> None:
        if self.is_file(path):
            self.filesystem.delete_file(self.at(path))
        elif self.exists(path):
            self.filesystem.delete_dir(self.at(path))


class LeaseHeldError(ValueError):
    """Another process is writing to the same output."""


def _holder_is_gone(holder: dict[str, Any]) -> bool:
    """True where the lease's owner cannot be writing any more: its process ended, or its heart stopped beating."""
    if holder.get("host") == socket.gethostname() and holder.get("boot") == _boot_id():
        try:
            os.kill(int(holder["pid"]), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return _process_start(int(holder["pid"])) != holder.get("process_start")
    return time.time() - float(holder.get("beat", 0)) > LEASE_STALE_S


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _process_start(pid: int) -> str:
    """Start time of a process in clock ticks since boot: a reused process id is not its former owner."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


@contextlib.contextmanager
def lease(folder: Folder, what: str) -> Iterator[None]:
    """Hold `folder` for writing. Raises LeaseHeldError, naming the holder, while another living process holds it."""
    mine = {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "pid": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "token": uuid.uuid4().hex,
        "what": what,
        "since": time.time(),
    }
    _take(folder, mine)
    stop, lost = threading.Event(), threading.Event()

    def beat() -> None:
        while not stop.wait(LEASE_BEAT_S):
            if not _is_mine(folder, mine):
                lost.set()
                return
            folder.write_json(LEASE_FILE, {**mine, "beat": time.time()})

    heart = threading.Thread(target=beat, name="lease", daemon=True)
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()
        if not lost.is_set() and _is_mine(folder, mine):
            folder.delete(LEASE_FILE)
    if lost.is_set():
        raise LeaseHeldError(
            f"{folder.url} was taken by another process meanwhile; run the same command again once it has ended"
        )


def _is_mine(folder: Folder, mine: dict[str, Any]) -> bool:
    """Whether the lease that stands is ours; a store that cannot be asked is not taken for lost."""
    try:
        return folder.read_json(LEASE_FILE).get("token") == mine["token"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True


def _take(folder: Folder, mine: dict[str, Any]) -> None:
    record = json.dumps({**mine, "beat": time.time()})
    if folder.exists(LEASE_FILE):
        holder = folder.read_json(LEASE_FILE)
        if not _holder_is_gone(holder):
            raise LeaseHeldError(
                f"{folder.url} is being written by {holder['what']} (process {holder['pid']} on {holder['host']}); "
                "wait for it to end, or write to another --output"
            )
        folder.delete(LEASE_FILE)
    if folder.is_local:
        path = Path(folder.at(LEASE_FILE))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "x") as stream:
                stream.write(record)
        except FileExistsError:
            raise LeaseHeldError(f"{folder.url} was taken by another process just now; wait for it to end") from None
        return
    # Object stores have no exclusive create here: write, then look whose record stands.
    folder.write(LEASE_FILE, record)
    time.sleep(0.2)
    if folder.read_json(LEASE_FILE).get("token") != mine["token"]:
        raise LeaseHeldError(f"{folder.url} was taken by another process just now; wait for it to end")
