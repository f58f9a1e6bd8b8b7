"""What an input consists of: shards, found by file, folder or pattern, and known by their content.

    data/{00000..00099}.tar     WebDataset; img2dataset's Parquet beside a tar is read with it
    part-*.parquet, list.tsv    tables with bytes, paths or URLs
    photos/                     a folder of images with captions beside them

A shard is the unit of work: its digest is over content alone (of a table that names images, over theirs too).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from cluster.storage import FileEntry, Folder, absolute, natural_key, resolve
from pipelines.readers.samples import group_key
from pipelines.readers.tables import image_column, image_digests
from pipelines.recipe import Input, RecipeError

FOLDER_SHARD_IMAGES = 1000
FORMATS_BY_SUFFIX = {
    ".tar": "webdataset",
    ".tar.gz": "webdataset",
    ".tgz": "webdataset",
    ".tar.bz2": "webdataset",
    ".tar.zst": "webdataset",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".tsv": "tsv",
    ".csv": "csv",
}
# What a folder is searched for. Lists are read where they are named: beside tars they are often something else.
PACKED = ("webdataset", "parquet")


@dataclass(frozen=True)
class InputShard:
    """One unit of input: a tar, a table, or a fixed run of a folder's images.

    address: the file, or the folder. members: for a folder, the paths below it that belong to this shard. sidecar:
    img2dataset's Parquet about the same samples. images: folders in which a table may name images. subset: only the
    uids of this file are read, each as often as it stands there. limit: read only this many rows; 0 reads all.
    """

    name: str
    address: str
    format: str
    size_bytes: int = 0
    mtime_ns: int = 0
    members: tuple[str, ...] = ()
    limit: int = 0
    dataset: str = ""
    sidecar: str = ""
    images: tuple[str, ...] = ()
    subset: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> InputShard:
        return cls(**{**value, "members": tuple(value["members"]), "images": tuple(value.get("images", ()))})


def discover(source: Input | Sequence[Input]) -> list[InputShard]:
    """The inputs' shards, input by input, each in natural order of its names. Raises RecipeError for an empty one."""
    sources = (source,) if isinstance(source, Input) else tuple(source)
    if not sources or not all(item.url for item in sources):
        raise RecipeError("no input: write input: {url: ...} in the recipe or give --input URL")
    names = [item.name or (f"input{place}" if len(sources) > 1 else "") for place, item in enumerate(sources)]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise RecipeError(f"input: two datasets are called {name!r}; give each a name of its own")
    return [shard for item, name in zip(sources, names, strict=True) for shard in _discover_one(item, name)]


def _discover_one(source: Input, dataset: str) -> list[InputShard]:
    images = tuple(absolute(folder) for folder in source.images)
    subset = absolute(source.subset) if source.subset else ""
    shards: list[InputShard] = []
    for pattern in _expand_braces(source.url):
        shards.extend(_expand(absolute(pattern), source.format))
    if not shards:
        raise RecipeError(
            f"input {source.url!r} holds no .tar, no .parquet and no images; "
            "give a file, a folder or a pattern such as data/{00000..00099}.tar"
        )
    shards = _with_sidecars(shards)
    return [replace(shard, dataset=dataset, images=images, subset=subset) for shard in shards]


def _expand_braces(url: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(url))
    except ValueError:
        raise RecipeError(f"input {url!r} has a brace too many or too few") from None


def format_of(path: str) -> str:
    """The format that a file's name stands for; "folder" for any other."""
    name = PurePosixPath(path).name.lower()
    return next((kind for suffix, kind in FORMATS_BY_SUFFIX.items() if name.endswith(suffix)), "folder")


def _expand(pattern: str, kind: str) -> list[InputShard]:
    """The shards of one file, folder or pattern with *, ? or [...] in its last part."""
    parent, _, last = pattern.rpartition("/")
    if any(character in last for character in "*?["):
        folder = Folder(parent)
        return [_file_shard(folder, entry, kind) for entry in folder.files("", last, recursive=False)]
    filesystem, path = resolve(pattern)
    info = filesystem.get_file_info(path)
    if info.is_file:
        return [_file_shard(Folder(parent), FileEntry(last, info.size, info.mtime_ns or 0), kind)]
    folder = Folder(pattern)
    if info.type == pafs.FileType.NotFound:
        raise RecipeError(f"input {pattern} does not exist")
    if kind == "folder":
        return _folder_shards(folder, folder.files())
    entries = folder.files()
    wanted = PACKED if kind == "auto" else (kind,)
    packed = [entry for entry in entries if format_of(entry.path) in wanted and not _is_hidden(entry.path)]
    if not packed:
        return _folder_shards(folder, entries)
    shards: list[InputShard] = []
    inside: dict[str, list[FileEntry]] = {}
    for entry in entries:
        inside.setdefault(entry.path.rpartition("/")[0], []).append(entry)
    for entry in packed:
        # img2dataset's "files" output: a folder of images and a Parquet of the same name beside it.
        beside = inside.get(entry.path.removesuffix(".parquet"))
        if beside and kind == "auto":
            (whole,) = _folder_shards(folder, beside, keys_each=len(beside))
            shards.append(replace(whole, sidecar=folder.address(entry.path)))
        else:
            shards.append(_file_shard(folder, entry, kind))
    return shards


def _is_hidden(path: str) -> bool:
    return PurePosixPath(path).name.startswith((".", "_"))


def _file_shard(folder: Folder, entry: FileEntry, kind: str) -> InputShard:
    found = kind if kind != "auto" else format_of(entry.path)
    if found == "folder":
        raise RecipeError(
            f"input {folder.address(entry.path)} is neither a tar nor a table; "
            "give its folder to read images with captions beside them, or say which format: it is"
        )
    name = PurePosixPath(entry.path).name
    return InputShard(name, folder.address(entry.path), found, entry.size_bytes, entry.mtime_ns)


def _with_sidecars(shards: list[InputShard]) -> list[InputShard]:
    """Tars together with img2dataset's Parquet of the same name, which is then no shard of its own."""
    tars = [shard for shard in shards if shard.format == "webdataset" and shard.address.endswith(".tar")]
    sidecar_of = {shard.address: f"{shard.address.removesuffix('.tar')}.parquet" for shard in tars}
    found: set[str] = set()
    if sidecar_of:
        filesystem, _ = resolve(tars[0].address)
        paths = [resolve(sidecar)[1] for sidecar in sidecar_of.values()]
        infos = filesystem.get_file_info(paths)
        found = {sidecar for sidecar, info in zip(sidecar_of.values(), infos, strict=True) if info.is_file}
    paired = []
    for shard in shards:
        sidecar = sidecar_of.get(shard.address, "")
        if sidecar in found:
            paired.append(replace(shard, sidecar=sidecar))
        elif shard.address not in found:
            paired.append(shard)
    return paired


def _folder_shards(
    folder: Folder, entries: Iterable[FileEntry], keys_each: int = FOLDER_SHARD_IMAGES
) -> list[InputShard]:
    """A folder's files as runs of `keys_each` keys, so that a picture and its caption stay together."""
    groups: dict[str, list[FileEntry]] = {}
    for entry in entries:
        if not PurePosixPath(entry.path).name.startswith("."):
            groups.setdefault(group_key(entry.path), []).append(entry)
    keys = sorted(groups, key=natural_key)
    shards = []
    for number, first in enumerate(range(0, len(keys), keys_each)):
        chosen = [entry for key in keys[first : first + keys_each] for entry in groups[key]]
        shards.append(
            InputShard(
                name=f"{PurePosixPath(folder.url).name}#{number:05d}",
                address=folder.url,
                format="folder",
                size_bytes=sum(entry.size_bytes for entry in chosen),
                mtime_ns=max(entry.mtime_ns for entry in chosen),
                # A name that is no UTF-8 cannot travel; what is written here is not there, and becomes a failed row.
                members=tuple(entry.path.encode("utf-8", "backslashreplace").decode() for entry in chosen),
            )
        )
    return shards


# --- content ---------------------------------------------------------------------------------------------------------


def shard_digest(shard: InputShard) -> str:
    """sha256 over a shard's content: its file's bytes; of a folder the names and bytes of its files; of a table that
    names images, their bytes too; and what is read with it (sidecar, subset)."""
    total = hashlib.sha256()
    if shard.format == "folder":
        for member in shard.members:
            total.update(f"{member}\0{_member_digest(f'{shard.address}/{member}')}\n".encode())
    else:
        own = _stream_digest(shard.address)
        total.update(f"{own}\n".encode())
        if names_images(shard):
            for content in image_digests(shard.address, shard.format, shard.images):
                total.update(f"{content}\n".encode())
        elif not shard.sidecar and not shard.subset:
            return own
    for beside in (shard.sidecar, shard.subset):
        if beside:
            total.update(f"{_stream_digest(beside)}\n".encode())
    return total.hexdigest()


def names_images(shard: InputShard) -> bool:
    """Whether a shard's images lie in files of their own, which may change while the shard's own file does not."""
    if shard.format == "parquet":
        filesystem, path = resolve(shard.address)
        try:
            with pq.ParquetFile(path, filesystem=filesystem) as file:
                return image_column(file.schema_arrow) is None
        except (pa.ArrowException, OSError):
            return False
    return shard.format in ("csv", "tsv")


def _stream_digest(address: str) -> str:
    filesystem, path = resolve(address)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path, compression=None) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _member_digest(address: str) -> str:
    try:
        return _stream_digest(address)
    except OSError:
        return "unreadable"
