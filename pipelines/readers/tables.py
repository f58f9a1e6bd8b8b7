"""Tables in: Parquet, CSV and TSV, with image bytes in a column, or with paths or URLs of images.

A column of bytes is looked for first (also in a struct that has `bytes`), then one of paths, then one of URLs; a table
of captions alone is read as well. Addresses are hostile: an image is only read where it lies below one of the folders
that `input.images` names (the table's own by default), links resolved. Nothing is downloaded: a row with a web address
has a caption and no image.

Parquet is read a few rows at a time, and a row group that would unpack to many times its size is refused.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pyarrow.types as pat

from cluster.storage import Folder, resolve
from pipelines.readers.samples import (
    ALL_ALIASES,
    CAPTION_ALIASES,
    KEY_ALIASES,
    MAX_MEMBER_BYTES,
    MAX_TEXT_BYTES,
    METADATA_ALIASES,
    URL_ALIASES,
    Sample,
    clean_name,
    describe,
    one_line,
)

# One dictionary entry can stand in every row: what a batch may hold at once is its rows times the largest image.
BATCH_ROWS = 16
MAX_EXPANSION = 100
FREE_EXPANSION_BYTES = 64 << 20
FETCH_THREADS = 16

IMAGE_ALIASES = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "img", "content")
WEB = re.compile(r"(https?|ftp)://", re.IGNORECASE)
PATH_ALIASES = ("image", "image_path", "path", "file_name", "filename", "file", "filepath", "image_file", "img_path")


class ImageFiles:
    """Images that a table names, read from the folders it may name them in."""

    def __init__(self, folders: Sequence[str]) -> None:
        self.folders = [Folder(folder) for folder in folders]

    def read(self, address: str) -> bytes:
        """The bytes of the image at `address`. Raises ValueError with a reason."""
        folder, path = self._place(address)
        info = folder.filesystem.get_file_info(folder.at(path))
        if info.type != pafs.FileType.File:
            raise ValueError("no such file" if info.type == pafs.FileType.NotFound else "not a regular file")
        if info.size is not None and info.size > MAX_MEMBER_BYTES:
            raise ValueError(f"image larger than {MAX_MEMBER_BYTES} bytes")
        try:
            with folder.open(path) as stream:
                return stream.read(MAX_MEMBER_BYTES)
        except OSError as problem:
            raise ValueError(f"unreadable file: {one_line(problem)}") from None

    def _place(self, address: str) -> tuple[Folder, str]:
        """The folder and the path below it. Raises ValueError where an address leads anywhere else."""
        scheme, separator, _ = address.partition("://")
        if any(character < " " for character in address) or len(address) > 4096:
            raise ValueError("not an address of a file")
        address = address.removeprefix("file://") if scheme == "file" else address
        for folder in self.folders:
            root = folder.url.removeprefix("file://").rstrip("/") + "/"
            whole = address if separator or address.startswith("/") else root + address
            path = whole.removeprefix(root)
            if path != whole and ".." not in path.split("/") and not path.startswith("/") and is_inside(folder, path):
                return folder, path
        raise ValueError("outside the folders that input.images allows")


def is_inside(folder: Folder, path: str) -> bool:
    """Whether `path` stays below `folder` once links are followed (object stores have none)."""
    if not folder.is_local:
        return True
    root = Path(folder.root).resolve()
    return Path(folder.at(path)).resolve().is_relative_to(root)


# --- rows ------------------------------------------------------------------------------------------------------------


def read_table(address: str, kind: str, images: Sequence[str]) -> Iterator[Sample]:
    """Samples of a Parquet, CSV or TSV file in row order; damage ends them with one that says so."""
    try:
        rows, find = _parquet(address) if kind == "parquet" else _delimited(address, kind)
        files = ImageFiles(images or (address.rpartition("/")[0],))
        yield from _samples(rows, find, files)
    except (pa.ArrowException, OSError, ValueError, csv.Error) as problem:
        yield Sample(key="", error=f"damaged {kind}: {one_line(problem)}")


def image_digests(address: str, kind: str, images: Sequence[str]) -> Iterator[str]:
    """sha256 of every image that a table names, in row order; for one that cannot be read, why."""
    files = ImageFiles(images or (address.rpartition("/")[0],))
    try:
        rows, find = _parquet(address) if kind == "parquet" else _delimited(address, kind)
        for row in rows:
            if isinstance(found := find(row), str) and not WEB.match(found):
                try:
                    yield hashlib.sha256(files.read(found)).hexdigest()
                except ValueError as problem:
                    yield str(problem)
    except (pa.ArrowException, OSError, ValueError, csv.Error) as problem:
        yield one_line(problem)


Find = Callable[[Mapping[str, Any]], bytes | str | None]


def _samples(rows: Iterable[Mapping[str, Any]], find: Find, files: ImageFiles) -> Iterator[Sample]:
    remote = any(not folder.is_local for folder in files.folders)
    numbered = enumerate(rows)
    with ThreadPoolExecutor(FETCH_THREADS if remote else 1) as threads:
        while batch := list(itertools.islice(numbered, BATCH_ROWS)):
            # Local files are read one by one, as they are asked for; remote ones a batch at a time, side by side.
            make = threads.map if remote else map
            yield from make(lambda item: _sample(item[0], item[1], find, files), batch)


def _sample(number: int, row: Mapping[str, Any], find: Find, files: ImageFiles) -> Sample:
    key = next((row[name] for name in KEY_ALIASES if isinstance(row.get(name), str | int)), None)
    sample = Sample(key=f"{number:09d}" if key in (None, "") else clean_name(str(key))[:200])
    describe(sample, row)
    if any("\udc80" <= character <= "\udcff" for text in row.values() if isinstance(text, str) for character in text):
        sample.error = sample.error or "unreadable caption: not UTF-8"
    found = find(row)
    if sample.error:
        return sample
    if found is None or found == "":
        sample.absent = "no image bytes"
    elif isinstance(found, str) and (web := WEB.match(found)):
        sample.absent = f"{web[1].lower()} images are not downloaded here: use img2dataset and give its output"
    elif isinstance(found, str):
        sample.member = clean_name(found)
        try:
            sample.data = files.read(found)
        except ValueError as problem:
            sample.error = str(problem)
    elif len(found) > MAX_MEMBER_BYTES:
        sample.error = f"image larger than {MAX_MEMBER_BYTES} bytes"
    else:
        sample.data = found
    return sample


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _parquet(address: str) -> tuple[Iterator[dict[str, Any]], Find]:
    filesystem, path = resolve(address)
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        schema = file.schema_arrow
    image = image_column(schema)
    where = image or _text_column(schema.names, lambda name: pat.is_string(schema.field(name).type))
    if where is None and not any(name in schema.names for name in CAPTION_ALIASES):
        raise ValueError(f"no column of images, addresses or captions among {', '.join(map(clean_name, schema.names))}")
    columns = list(dict.fromkeys(name for name in schema.names if name in ALL_ALIASES or name == where))
    # A column of bytes or of nested values under a caption's name is no caption; some are lists of texts by nature.
    lists = {where, "captions", *METADATA_ALIASES["robots"]}
    columns = [name for name in columns if name in lists or _is_plain(schema.field(name).type)]

    def find(row: Mapping[str, Any]) -> bytes | str | None:
        value = row.get(where) if where else None
        return value.get("bytes") if isinstance(value, dict) else value

    return parquet_rows(address, columns), find


def parquet_rows(address: str, columns: Sequence[str], groups: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file (or of some of its row groups) as dictionaries, read few at a time.

    Raises ValueError for a file that unpacks to far too much.
    """
    filesystem, path = resolve(address)
    with pq.ParquetFile(path, filesystem=filesystem, pre_buffer=False, buffer_size=1 << 20) as file:
        _refuse_expansion(file.metadata)
        for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(columns), use_threads=False):
            yield from batch.to_pylist()


def _refuse_expansion(metadata: Any) -> None:
    for group in range(metadata.num_row_groups):
        for place in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(place)
            allowed = FREE_EXPANSION_BYTES + MAX_EXPANSION * max(chunk.total_compressed_size, 0)
            if chunk.total_uncompressed_size > allowed:
                raise ValueError(f"a column expands to more than {MAX_EXPANSION} times its size")


def _is_plain(kind: pa.DataType) -> bool:
    return pat.is_string(kind) or pat.is_large_string(kind) or pat.is_integer(kind) or pat.is_floating(kind)


def image_column(schema: pa.Schema) -> str | None:
    """The column of image bytes, or of structs with `bytes`; a usual name first."""
    for name in [*IMAGE_ALIASES, *schema.names]:
        if name in schema.names:
            kind = schema.field(name).type
            if pat.is_struct(kind):
                kind = next((kind.field(i).type for i in range(kind.num_fields) if kind.field(i).name == "bytes"), None)
            if kind is not None and (pat.is_binary(kind) or pat.is_large_binary(kind)):
                return name
    return None


def _text_column(names: Sequence[str], fits: Callable[[str], bool]) -> str | None:
    return next((name for name in (*PATH_ALIASES, *URL_ALIASES) if name in names and fits(name)), None)


# --- CSV and TSV -----------------------------------------------------------------------------------------------------


def _delimited(address: str, kind: str) -> tuple[Iterator[dict[str, Any]], Find]:
    """Rows of a CSV or TSV with a header line, quoted as the csv module has it."""
    rows = _delimited_rows(address, "\t" if kind == "tsv" else ",")
    names = next(rows, {"": ""})
    where = _text_column(list(names), lambda name: True)
    if where is None and not any(name in names for name in CAPTION_ALIASES):
        raise ValueError(f"no column of addresses or captions among {', '.join(map(clean_name, names))}")
    return rows, lambda row: row.get(where) if where else None


def _delimited_rows(address: str, delimiter: str) -> Iterator[dict[str, Any]]:
    """First the header as {name: name}, then a dictionary a row."""
    filesystem, path = resolve(address)
    with filesystem.open_input_stream(path, compression=None, buffer_size=1 << 20) as stream:
        limit = csv.field_size_limit(MAX_TEXT_BYTES)
        try:
            header: list[str] | None = None
            for cells in csv.reader(_lines(io.BufferedReader(stream)), delimiter=delimiter, strict=False):  # type: ignore[arg-type]
                if header is None:
                    header = cells
                    yield {name: name for name in header}
                elif cells:
                    yield dict(zip(header, cells, strict=False))
        finally:
            csv.field_size_limit(limit)


def _lines(stream: io.BufferedReader) -> Iterator[str]:
    """Lines of bounded length; bytes that are no UTF-8 pass as lone surrogates, which `_sample` looks for."""
    first = True
    while line := stream.readline(4 * MAX_TEXT_BYTES):
        if len(line) == 4 * MAX_TEXT_BYTES and not line.endswith(b"\n"):
            raise ValueError(f"a line longer than {4 * MAX_TEXT_BYTES} bytes")
        text = line.decode("utf-8", "surrogateescape")
        yield text.removeprefix("\ufeff") if first else text
        first = False
