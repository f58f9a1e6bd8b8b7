"""A tar read once, front to back, in bounded memory, whatever its headers claim.

Header blocks are parsed by the standard library (`tarfile.TarInfo.frombuf`); the walk from one to the next is here,
since `tarfile`'s own trusts them: a huge extended header is read whole, chained ones recurse, a negative size turns
the walk round for ever. Links, devices and sparse members are never followed, nothing is written anywhere, and a name
is only ever a name.

A compressed tar (gzip, bzip2, zstd) is read as it is unpacked, up to MAX_EXPANSION times its size.
"""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from pipelines.readers.samples import MAX_MEMBER_BYTES, Member, clean_name

BLOCK = tarfile.BLOCKSIZE
# Extended headers hold names of a few hundred bytes; ours need no more than path and size.
MAX_HEADER_BYTES = 64 << 10
PIECE_BYTES = 1 << 20
MAX_EXPANSION = 100
FREE_EXPANSION_BYTES = 64 << 20
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}
_NO_DATA = (tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


class DamagedTarError(ValueError):
    """A tar from here on not readable; the message says why."""


def tar_members(filesystem: Any, path: str) -> Iterator[Member]:
    """Members of a tar in order. A damaged tail yields the good members and one that stands for the rest."""
    try:
        with filesystem.open_input_stream(path, compression=None, buffer_size=PIECE_BYTES) as raw:
            magic = raw.read(4)
        compression = next((name for start, name in COMPRESSIONS.items() if magic.startswith(start)), None)
        most = 0
        if compression:
            most = FREE_EXPANSION_BYTES + MAX_EXPANSION * filesystem.get_file_info(path).size
        with filesystem.open_input_stream(path, compression=compression, buffer_size=PIECE_BYTES) as stream:
            yield from _walk(_Blocks(stream, most))
    except DamagedTarError as problem:
        yield Member("", error=f"damaged tar: {problem}")
    except OSError:
        # The words of a codec or a filesystem differ from version to version; the reason must not.
        yield Member("", error="damaged tar: unreadable bytes")


def tar_places(filesystem: Any, path: str) -> dict[str, tuple[int, int]]:
    """(offset, size) of the data of each readable member of an uncompressed tar, by clean name; no data is read."""
    places: dict[str, tuple[int, int]] = {}
    with filesystem.open_input_stream(path, compression=None, buffer_size=PIECE_BYTES) as stream:
        blocks = _Blocks(stream, 0, contents=False)
        with contextlib.suppress(DamagedTarError):
            for member in _walk(blocks):
                if not member.error:
                    places.setdefault(clean_name(member.path), (member.offset, member.size))
    return places


class _Blocks:
    """Whole reads and skips over a stream. most: bytes that may come out of it, 0 for as many as there are. contents:
    whether members' data is wanted."""

    def __init__(self, stream: IO[bytes], most: int, contents: bool = True) -> None:
        self.stream = stream
        self.contents = contents
        self.most = most
        self.position = 0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer only at the end."""
        pieces = []
        left = size
        while left and (piece := self.stream.read(min(left, PIECE_BYTES))):
            pieces.append(piece)
            left -= len(piece)
        self.position += size - left
        if self.most and self.position > self.most:
            raise DamagedTarError(f"it expands to more than {MAX_EXPANSION} times its size")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def member(self, size: int) -> bytes:
        """The data of a member of `size` bytes, and past its padding."""
        data = self.read(size)
        if len(data) < size:
            raise DamagedTarError("it breaks off")
        self.skip(-size % BLOCK)
        return data

    def skip(self, size: int) -> None:
        while size:
            piece = len(self.read(min(size, PIECE_BYTES)))
            if not piece:
                raise DamagedTarError("it breaks off")
            size -= piece

    def skip_member(self, size: int) -> None:
        """Past the data of a member of `size` bytes and its padding."""
        self.skip(size + -size % BLOCK)


def _walk(blocks: _Blocks) -> Iterator[Member]:
    """Header by header to the end mark. Raises DamagedTarError where the next header cannot be found."""
    extended: dict[str, str] = {}
    error: str | None = None
    while True:
        block = blocks.read(BLOCK)
        if len(block) < BLOCK:
            raise DamagedTarError("it breaks off" if blocks.position else "it is empty")
        if block == tarfile.NUL * BLOCK:
            break
        entry = _header(block)
        if entry.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if entry.size > MAX_HEADER_BYTES:
                blocks.skip_member(entry.size)
                error = f"extended header larger than {MAX_HEADER_BYTES} bytes"
            elif entry.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = blocks.member(entry.size).rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                extended.update(_pax_records(blocks.member(entry.size)))
            continue
        if entry.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            blocks.skip_member(entry.size)
            continue
        yield from _member(blocks, entry, block, extended, error)
        extended, error = {}, None
    _expect_padding(blocks)


def _header(block: bytes) -> tarfile.TarInfo:
    try:
        entry = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        raise DamagedTarError("unreadable header") from None
    if entry.size < 0:
        raise DamagedTarError("unreadable header: a negative size")
    return entry


def _member(
    blocks: _Blocks, entry: tarfile.TarInfo, block: bytes, extended: dict[str, str], error: str | None
) -> Iterator[Member]:
    name = extended.get("path", entry.name).strip("/") or "?"
    size = entry.size
    if "size" in extended:
        if not extended["size"].isascii() or not extended["size"].isdigit() or len(extended["size"]) > 18:
            raise DamagedTarError("unreadable header: a size that is no number")
        size = int(extended["size"])
    sparse = entry.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in extended)
    if entry.type == tarfile.GNUTYPE_SPARSE:
        more = block[482]
        while more:  # an old GNU sparse header goes on in blocks of its own
            more = blocks.member(BLOCK)[504]
    if entry.type == tarfile.DIRTYPE:
        return
    if entry.type in _NO_DATA:
        yield Member(name, error=error or "not a regular file")
        return
    if sparse:
        error = error or "a sparse member"
    elif not entry.isreg():
        error = error or "not a regular file"
    elif size > MAX_MEMBER_BYTES:
        error = error or f"member larger than {MAX_MEMBER_BYTES} bytes"
    if error:
        blocks.skip_member(size)
        yield Member(name, error=error)
        return
    offset = blocks.position
    if blocks.contents:
        yield Member(name, blocks.member(size), offset=offset, size=size)
    else:
        blocks.skip_member(size)
        yield Member(name, offset=offset, size=size)


def _pax_records(data: bytes) -> dict[str, str]:
    """The records "LENGTH key=value\\n" of an extended header, as far as they can be read."""
    records: dict[str, str] = {}
    place = 0
    while place < len(data):
        length, space, _ = data[place : place + 8].partition(b" ")
        if not space or not length.isdigit() or not len(length) + 2 < int(length) <= len(data) - place:
            break
        key, equals, value = data[place + len(length) + 1 : place + int(length) - 1].partition(b"=")
        if equals:
            records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        place += int(length)
    return records


def _expect_padding(blocks: _Blocks) -> None:
    """Only zeros may follow the end mark: what comes after it other readers would never see."""
    while piece := blocks.read(PIECE_BYTES):
        if piece.count(0) != len(piece):
            raise DamagedTarError("data after its end mark")
