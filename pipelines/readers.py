"""Raw data in: WebDataset tars, Parquet with image bytes, and folders of images with captions beside them.

`discover(input)` lists the input as shards, in order; `read(shard)` streams a shard's samples, one for every image
and one for everything that should have been an image and is not. Nothing is lost in silence: a member that belongs to
no image, a caption that is not text, a tar whose tail is damaged, each becomes a sample with an error.

Inputs are hostile: members are never unpickled, never written anywhere under their own names, and never larger in
memory than MAX_MEMBER_BYTES.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from cluster.storage import Folder, absolute, natural_key, resolve
from pipelines.recipe import Input, RecipeError
from stages.decode import sniff

READER_VERSION = 2  # 2: a row without image bytes is read; stages that need a picture fail it
MAX_MEMBER_BYTES = 256 << 20
MAX_TEXT_BYTES = 1 << 20
FOLDER_SHARD_IMAGES = 1000
PARQUET_BATCH_ROWS = 256

IMAGE_EXTENSIONS = frozenset(
    [
        "jpg",
        "jpeg",
        "jpe",
        "png",
        "webp",
        "gif",
        "tif",
        "tiff",
        "bmp",
        "pgm",
        "ppm",
        "pbm",
        "pnm",
        "avif",
        "svg",
        "heic",
        "jfif",
    ]
)
CAPTION_EXTENSIONS = ("txt", "caption", "text")
# Members that ride along with a sample and are not pictures; anything else alone under its key is reported.
SIDECAR_EXTENSIONS = frozenset(
    [
        *CAPTION_EXTENSIONS,
        *[
            "json",
            "cls",
            "npy",
            "npz",
            "pth",
            "pt",
            "pyd",
            "pkl",
            "pickle",
            "bin",
            "ten",
            "mp",
            "idx",
            "id",
            "url",
            "index",
            "parquet",
            "md",
        ],
    ]
)

# Column names of LAION, COYO, DataComp, img2dataset, PD12M and Hugging Face image datasets.
CAPTION_ALIASES = ("caption", "text", "TEXT", "org_caption", "alt_text", "alt", "prompt")
IMAGE_ALIASES = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "img", "content")
KEY_ALIASES = ("key", "uid", "id", "__key__", "hash", "SAMPLE_ID", "filename", "image_id")
URL_ALIASES = ("url", "URL", "image_url")


@dataclass(frozen=True)
class InputShard:
    """One unit of input: a tar, a Parquet file, or a fixed run of a folder's images.

    address: the file, or the folder. members: for a folder, the paths below it that belong to this shard.
    """

    name: str
    address: str
    format: str
    size_bytes: int = 0
    mtime_ns: int = 0
    members: tuple[str, ...] = ()
    limit: int = 0  # read only this many rows; 0 reads all

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> InputShard:
        return cls(**{**value, "members": tuple(value["members"])})


@dataclass
class Sample:
    """One occurrence as it came in: encoded bytes, captions and ids; or an error that says why there is no image."""

    key: str
    member: str = ""
    data: bytes | None = None
    caption: str | None = None
    alternatives: list[str] = field(default_factory=list)
    url: str | None = None
    source_uid: str | None = None
    error: str | None = None


def discover(source: Input) -> list[InputShard]:
    """The input's shards in natural order of their names. Raises RecipeError where there is nothing to read."""
    if not source.url:
        raise RecipeError("no input: write input: {url: ...} in the recipe or give --input URL")
    addresses = [address for pattern in _expand_braces(source.url) for address in _expand(pattern, source.format)]
    shards: list[InputShard] = []
    for folder, path, size, mtime in addresses:
        kind = source.format if source.format != "auto" else _format_of(path)
        if kind in ("webdataset", "parquet"):
            shards.append(InputShard(PurePosixPath(path).name, folder.address(path), kind, size, mtime))
        else:
            shards.extend(_folder_shards(folder))
    if not shards:
        raise RecipeError(
            f"input {source.url!r} holds no .tar, no .parquet and no images; "
            "give a file, a folder or a pattern such as data/{00000..00099}.tar"
        )
    return shards


def _expand_braces(url: str) -> list[str]:
    from braceexpand import braceexpand

    return list(braceexpand(url))


def _format_of(path: str) -> str:
    suffix = PurePosixPath(path).suffix.lower()
    return {".tar": "webdataset", ".parquet": "parquet", ".pq": "parquet"}.get(suffix, "folder")


def _expand(pattern: str, kind: str) -> list[tuple[Folder, str, int, int]]:
    """(folder, path below it, size, mtime) of each file that `pattern` names; path "" stands for a folder of images."""
    pattern = absolute(pattern)
    parent, _, last = pattern.rpartition("/")
    if any(character in last for character in "*?["):
        folder = Folder(parent)
        return [(folder, entry.path, entry.size_bytes, entry.mtime_ns) for entry in folder.files("", last, False)]
    filesystem, path = resolve(pattern)
    info = filesystem.get_file_info(path)
    if info.is_file:
        return [(Folder(parent), last, info.size, info.mtime_ns or 0)]
    folder = Folder(pattern)
    if not folder.exists():
        raise RecipeError(f"input {pattern} does not exist")
    if kind == "folder":
        return [(folder, "", 0, 0)]
    packed = [entry for entry in folder.files() if _format_of(entry.path) != "folder" and _wanted(entry.path, kind)]
    return [(folder, entry.path, entry.size_bytes, entry.mtime_ns) for entry in packed] or [(folder, "", 0, 0)]


def _wanted(path: str, kind: str) -> bool:
    return kind in ("auto", _format_of(path)) and not PurePosixPath(path).name.startswith((".", "_"))


def _folder_shards(folder: Folder) -> list[InputShard]:
    """A folder's files as runs of FOLDER_SHARD_IMAGES keys, so that a picture and its caption stay together."""
    groups: dict[str, list[Any]] = {}
    for entry in folder.files():
        if not PurePosixPath(entry.path).name.startswith("."):
            groups.setdefault(_group_key(entry.path), []).append(entry)
    keys = sorted(groups, key=natural_key)
    shards = []
    for number, first in enumerate(range(0, len(keys), FOLDER_SHARD_IMAGES)):
        entries = [entry for key in keys[first : first + FOLDER_SHARD_IMAGES] for entry in groups[key]]
        shards.append(
            InputShard(
                name=f"{PurePosixPath(folder.url).name}#{number:05d}",
                address=folder.url,
                format="folder",
                size_bytes=sum(entry.size_bytes for entry in entries),
                mtime_ns=max(entry.mtime_ns for entry in entries),
                members=tuple(entry.path for entry in entries),
            )
        )
    return shards


def shard_digest(shard: InputShard) -> str:
    """sha256 over a shard's bytes (for a folder: over the names and digests of its files)."""
    if shard.format != "folder":
        return _stream_digest(shard.address)
    total = hashlib.sha256()
    for member in shard.members:
        total.update(f"{member}\0{_stream_digest(f'{shard.address}/{member}')}\n".encode())
    return total.hexdigest()


def _stream_digest(address: str) -> str:
    filesystem, path = resolve(address)
    digest = hashlib.sha256()
    with filesystem.open_input_file(path) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read(shard: InputShard) -> Iterator[Sample]:
    """Stream the samples of one shard in their order; damage becomes samples with an error, never an exception."""
    if shard.format == "parquet":
        samples = _read_parquet(shard)
    else:
        samples = _samples(_tar_members(shard) if shard.format == "webdataset" else _folder_members(shard))
    for sample in itertools.islice(samples, shard.limit or None):
        # img2dataset's JSON repeats the caption of the text member.
        others = dict.fromkeys(text for text in sample.alternatives if text)
        others.pop(sample.caption or "", None)
        sample.alternatives = list(others)
        yield sample


# --- members to samples ----------------------------------------------------------------------------------------------


@dataclass
class Member:
    """One file of a tar or folder. path "": the container itself is damaged and `error` says how."""

    path: str
    data: bytes | None = None
    error: str | None = None


def _group_key(path: str) -> str:
    """WebDataset's key: the path up to the first dot of its last part."""
    parent, slash, name = path.rpartition("/")
    return f"{parent}{slash}{name.partition('.')[0]}"


def _extension(path: str) -> str:
    return PurePosixPath(path).suffix.lower().lstrip(".")


def _samples(members: Iterable[Member]) -> Iterator[Sample]:
    """Group consecutive members by key, and each group into its samples."""
    group: list[Member] = []
    for member in members:
        if group and (not member.path or _group_key(member.path) != _group_key(group[0].path)):
            yield from _group_samples(group)
            group = []
        if member.path:
            group.append(member)
        else:
            yield Sample(key="", error=member.error)
    if group:
        yield from _group_samples(group)


def _group_samples(group: list[Member]) -> Iterator[Sample]:
    """A group's pictures, each with the caption of its own stem, else the group's; and what is wrong with the rest."""
    pictures = [member for member in group if _is_picture(member)]
    others = [member for member in group if not _is_picture(member)]
    for picture in pictures:
        sample = Sample(_group_key(picture.path), picture.path, picture.data, error=picture.error)
        _add_texts(sample, others)
        yield sample
    strangers = [member for member in others if _extension(member.path) not in SIDECAR_EXTENSIONS or member.error]
    for stranger in strangers:
        reason = stranger.error or "not an image of a known format"
        yield Sample(_group_key(stranger.path), stranger.path, error=reason)
    if not pictures and not strangers:
        sample = Sample(_group_key(group[0].path), group[0].path, error="no image beside it")
        _add_texts(sample, others)
        yield sample


def _is_picture(member: Member) -> bool:
    extension = _extension(member.path)
    if extension in IMAGE_EXTENSIONS:
        return True
    # Bytes are what a decoder reads: a JPEG under an unknown name is still a picture.
    return extension not in SIDECAR_EXTENSIONS and member.data is not None and sniff(member.data) is not None


def _add_texts(sample: Sample, others: list[Member]) -> None:
    stem = str(PurePosixPath(sample.member).with_suffix(""))
    for member in sorted(others, key=lambda other: str(PurePosixPath(other.path).with_suffix("")) != stem):
        extension = _extension(member.path)
        if member.data is None or (extension not in CAPTION_EXTENSIONS and extension != "json"):
            continue
        try:
            text = _text(member.data)
            if extension == "json":
                _add_metadata(sample, json.loads(text))
            elif sample.caption is None:
                sample.caption = text.strip()
        except (ValueError, RecursionError) as problem:
            kind = "metadata" if extension == "json" else "caption"
            sample.error = sample.error or f"unreadable {kind}: {_one_line(problem)}"


def _text(data: bytes) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"larger than {MAX_TEXT_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None


def _one_line(problem: BaseException) -> str:
    return (str(problem).splitlines() or [""])[0][:120] or type(problem).__name__


def _add_metadata(sample: Sample, metadata: Any) -> None:
    """Captions, URL and id from img2dataset's JSON member (also under the names other datasets give them)."""
    if not isinstance(metadata, dict):
        return
    caption = _first(metadata, CAPTION_ALIASES)
    if isinstance(caption, str):
        if sample.caption is None:
            sample.caption = caption.strip()
        else:
            sample.alternatives.append(caption.strip())
    captions = metadata.get("captions")
    if isinstance(captions, list):
        sample.alternatives.extend(text.strip() for text in captions[:64] if isinstance(text, str))
    url = _first(metadata, URL_ALIASES)
    sample.url = sample.url or (url if isinstance(url, str) else None)
    source_uid = _first(metadata, KEY_ALIASES)
    sample.source_uid = sample.source_uid or (str(source_uid)[:200] if isinstance(source_uid, str | int) else None)


def _first(metadata: dict[str, Any], names: Iterable[str]) -> Any:
    return next((metadata[name] for name in names if metadata.get(name) is not None), None)


# --- containers ------------------------------------------------------------------------------------------------------


def _tar_members(shard: InputShard) -> Iterator[Member]:
    """Members of a tar in order. A damaged tail yields the good members and one that stands for the rest."""
    filesystem, path = resolve(shard.address)
    with filesystem.open_input_file(path) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for entry in archive:
                    archive.members.clear()  # type: ignore[attr-defined]  # it would remember every header it has seen
                    if entry.isdir():
                        continue
                    yield _tar_member(archive, entry)
                end = archive.offset
            stream.seek(end)
            # tarfile takes a damaged or missing header for the end; the format ends with a block of zeros.
            block = stream.read(tarfile.BLOCKSIZE)
            if block != tarfile.NUL * tarfile.BLOCKSIZE:
                yield Member("", error="damaged tar: " + ("it breaks off" if len(block) < 512 else "unreadable header"))
        except (tarfile.TarError, OSError, EOFError, ValueError) as problem:
            yield Member("", error=f"damaged tar: {_one_line(problem)}")


def _tar_member(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> Member:
    if not entry.isreg():
        return Member(entry.name, error="not a regular file")
    if entry.size > MAX_MEMBER_BYTES:
        return Member(entry.name, error=f"member larger than {MAX_MEMBER_BYTES} bytes")
    content = archive.extractfile(entry)
    return Member(entry.name, content.read() if content else b"")


def _folder_members(shard: InputShard) -> Iterator[Member]:
    folder = Folder(shard.address)
    for path in shard.members:
        try:
            with folder.open(path) as stream:
                if stream.size() > MAX_MEMBER_BYTES:
                    yield Member(path, error=f"file larger than {MAX_MEMBER_BYTES} bytes")
                else:
                    yield Member(path, stream.read())
        except OSError as problem:
            yield Member(path, error=f"unreadable file: {_one_line(problem)}")


def _read_parquet(shard: InputShard) -> Iterator[Sample]:
    """Rows of a Parquet file: image bytes in a binary column or in a struct that has `bytes`, or captions alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    filesystem, path = resolve(shard.address)
    number = 0
    try:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            names = file.schema_arrow.names
            caption, key, url = (_alias(names, wanted) for wanted in (CAPTION_ALIASES, KEY_ALIASES, URL_ALIASES))
            image = _image_column(file.schema_arrow, needed=caption is None)
            more = "captions" if "captions" in names else None
            columns = [name for name in (image, caption, key, url, more) if name]
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=list(dict.fromkeys(columns))):
                for row in batch.to_pylist():
                    data = row[image] if image else None
                    data = data["bytes"] if isinstance(data, dict) else data
                    sample = Sample(key=str(row[key])[:200] if key and row[key] is not None else f"{number:09d}")
                    _add_metadata(sample, row)
                    if data is not None and len(data) > MAX_MEMBER_BYTES:
                        sample.error = f"image larger than {MAX_MEMBER_BYTES} bytes"
                    else:
                        sample.data = data
                    yield sample
                    number += 1
    except (pa.ArrowException, OSError, ValueError) as problem:
        yield Sample(key="", error=f"damaged parquet: {_one_line(problem)}")


def _alias(names: list[str], aliases: Iterable[str]) -> str | None:
    return next((alias for alias in aliases if alias in names), None)


def _image_column(schema: Any, needed: bool = True) -> str | None:
    """The column of image bytes. Without one: None, or ValueError where it is `needed`."""
    import pyarrow.types as pat

    for name in [*IMAGE_ALIASES, *schema.names]:
        if name in schema.names:
            kind = schema.field(name).type
            if pat.is_struct(kind):
                kind = next((kind.field(i).type for i in range(kind.num_fields) if kind.field(i).name == "bytes"), None)
            if kind is not None and (pat.is_binary(kind) or pat.is_large_binary(kind)):
                return name
    if needed:
        raise ValueError(f"no column of image bytes among {', '.join(schema.names)}")
    return None
