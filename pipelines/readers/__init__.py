"""Raw data in: WebDataset tars, img2dataset's output, tables with images or their addresses, folders of images.

`discover(input)` lists the input as shards, in order; `read(shard)` streams a shard's samples, one for every image
and one for everything that should have been an image and is not. Nothing is lost in silence: a member that belongs to
no image, a caption that is not text, a tar whose tail is damaged, each becomes a sample with an error.

Inputs are hostile: nothing is unpickled, nothing is written under a name that came in, nothing is read outside the
input, and memory is bounded whatever sizes are claimed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Folder, resolve
from pipelines.readers.samples import (
    ALL_ALIASES,
    MAX_MEMBER_BYTES,
    Member,
    Sample,
    clean_name,
    describe,
    one_line,
    samples_of,
)
from pipelines.readers.shards import InputShard, discover, names_images, shard_digest
from pipelines.readers.subset import Subset
from pipelines.readers.tables import is_inside, parquet_rows, read_table
from pipelines.readers.tar import tar_members

__all__ = ["READER_VERSION", "InputShard", "Sample", "discover", "names_images", "read", "shard_digest"]

READER_VERSION = 4
# A shard is held as rows by one worker: more samples than this in one file are not read.
MAX_SHARD_SAMPLES = 500_000


def read(shard: InputShard) -> Iterator[Sample]:
    """Stream the samples of one shard in their order; damage becomes samples with an error, never an exception."""
    for number, sample in enumerate(itertools.islice(_chosen(shard), shard.limit or None)):
        if number == MAX_SHARD_SAMPLES:
            yield Sample(key="", error=f"more than {MAX_SHARD_SAMPLES} samples in one shard: the rest is not read")
            return
        # img2dataset's JSON repeats the caption of the text member.
        others = dict.fromkeys(text for text in sample.alternatives if text)
        others.pop(sample.caption or "", None)
        sample.alternatives = list(others)
        yield sample


def _chosen(shard: InputShard) -> Iterator[Sample]:
    """The shard's samples, of a subset each as often as its uid stands there."""
    samples = _samples(shard)
    if not shard.subset:
        yield from samples
        return
    subset = Subset.open(shard.subset)
    for sample in samples:
        yield from itertools.repeat(sample, subset.multiplicity(sample.source_uid))


def _samples(shard: InputShard) -> Iterator[Sample]:
    if shard.format in ("parquet", "csv", "tsv"):
        return read_table(shard.address, shard.format, shard.images)
    members = _folder_members(shard) if shard.format == "folder" else tar_members(*resolve(shard.address))
    samples = samples_of(members)
    return _with_sidecar(samples, shard.sidecar) if shard.sidecar else samples


def _folder_members(shard: InputShard) -> Iterator[Member]:
    folder = Folder(shard.address)
    for path in shard.members:
        try:
            if not is_inside(folder, path):
                yield Member(path, error="a link that leads out of the folder")
                continue
            with folder.open(path) as stream:
                if stream.size() > MAX_MEMBER_BYTES:
                    yield Member(path, error=f"file larger than {MAX_MEMBER_BYTES} bytes")
                else:
                    yield Member(path, stream.read())
        except OSError as problem:
            yield Member(path, error=f"unreadable file: {one_line(problem)}")


def _with_sidecar(samples: Iterator[Sample], address: str) -> Iterator[Sample]:
    """Samples with what img2dataset's Parquet says about them, then a failed one for every row that has no image."""
    try:
        rows: dict[str, dict[str, Any]] = {}
        for row in itertools.islice(parquet_rows(address, _sidecar_columns(address)), MAX_SHARD_SAMPLES):
            rows[clean_name(str(row["key"]))] = row
    except (pa.ArrowException, OSError, ValueError) as problem:
        yield from samples
        yield Sample(key="", error=f"damaged parquet beside the shard: {one_line(problem)}")
        return
    for sample in samples:
        # Keys are names of files, in a folder below one for each shard.
        key = sample.key if sample.key in rows else PurePosixPath(sample.key).name
        if key in rows:
            describe(sample, rows.pop(key))
        yield sample
    for key, row in rows.items():
        sample = Sample(key)
        describe(sample, row)
        sample.error = sample.error or "in the shard's parquet, but there is no image"
        yield sample


def _sidecar_columns(address: str) -> list[str]:
    """The sidecar's columns that are known. Raises ValueError for one without keys."""
    filesystem, path = resolve(address)
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        names = file.schema_arrow.names
    if "key" not in names:
        raise ValueError(f"no column key among {', '.join(map(clean_name, names))}")
    return [name for name in names if name in ALL_ALIASES]
