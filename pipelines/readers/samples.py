"""Samples as they came in, and how files that lie side by side become samples.

Files are grouped by key, as WebDataset has it: the path up to the first dot of its last part. Nothing is lost in
silence: a file that belongs to no image, a caption that is not text, metadata that is not JSON, each becomes a sample
with an error. Everything read is hostile: names and texts are cleaned of what no column can hold, files are never
unpickled, and a group holds a bounded number of bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from stages.decode import sniff

MAX_MEMBER_BYTES = 64 << 20
MAX_TEXT_BYTES = 1 << 20
MAX_NAME_CHARACTERS = 400
MAX_CAPTIONS = 64
# Bytes and files held under one key; what comes after them under the same key is refused.
MAX_GROUP_BYTES = 128 << 20
MAX_GROUP_MEMBERS = 64

IMAGE_EXTENSIONS = frozenset(
    "jpg jpeg jpe jfif png webp gif tif tiff bmp pgm ppm pbm pnm avif svg heic".split()  # noqa: SIM905
)
CAPTION_EXTENSIONS = ("txt", "caption", "text")
# Members that ride along with a sample and are not pictures; anything else alone under its key is reported.
SIDECAR_EXTENSIONS = frozenset(
    [
        *CAPTION_EXTENSIONS,
        *"json cls npy npz pth pt pyd pkl pickle bin ten mp idx id url index parquet md".split(),  # noqa: SIM905
    ]
)

# Column names of LAION, COYO, DataComp, img2dataset, PD12M, Recap-DataComp and Hugging Face image datasets.
CAPTION_ALIASES = ("caption", "text", "TEXT", "org_caption", "alt_text", "alt", "prompt")
URL_ALIASES = ("url", "URL", "image_url")
# An id that a dataset gave comes before the key, which is often no more than a place in a shard.
SOURCE_UID_ALIASES = ("uid", "id", "SAMPLE_ID", "hash", "image_id", "key", "__key__", "filename", "file_name")
KEY_ALIASES = ("key", "__key__", "uid", "id", "SAMPLE_ID", "hash", "filename", "file_name", "image_id")
METADATA_ALIASES: Mapping[str, tuple[str, ...]] = {
    "width": ("original_width", "width", "WIDTH"),
    "height": ("original_height", "height", "HEIGHT"),
    "clip_b32_score": ("clip_b32_similarity_score", "clip_similarity_vitb32", "similarity", "org_clip_score"),
    "clip_l14_score": ("clip_l14_similarity_score", "clip_similarity_vitl14"),
    "aesthetic": ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score_laion_v2"),
    "unsafe": ("punsafe", "nsfw_score_opennsfw2"),
    "watermark": ("pwatermark", "watermark_score"),
    "hash": ("sha256", "md5", "hash"),
    "language": ("LANGUAGE", "language"),
    "license": ("license", "LICENSE"),
    # What a server or page asked of machines: the X-Robots-Tag header or the robots meta tag, as text or a list.
    "robots": ("robots", "x_robots_tag", "x-robots-tag", "X-Robots-Tag"),
    "mime_type": ("mime_type",),
    "source": ("source",),
    "exif": ("exif",),
}
STATUS_NAMES = ("status", "error_message")
ALL_ALIASES = frozenset(
    [
        *CAPTION_ALIASES,
        "re_caption",
        "captions",
        *URL_ALIASES,
        *SOURCE_UID_ALIASES,
        *STATUS_NAMES,
        *(name for names in METADATA_ALIASES.values() for name in names),
    ]
)


@dataclass
class Sample:
    """One occurrence as it came in: encoded bytes, captions and ids; or an error that says what is wrong with it.

    absent: why there is no image where that is no error: a row of a list can be judged by its caption alone.
    metadata: what the dataset says about the image, under the names of METADATA_ALIASES.
    """

    key: str
    member: str = ""
    data: bytes | None = None
    caption: str | None = None
    alternatives: list[str] = field(default_factory=list)
    url: str | None = None
    source_uid: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    absent: str | None = None
    error: str | None = None


@dataclass
class Member:
    """One file of a tar or folder. path "": the container itself is damaged and `error` says how.

    offset, size: where the data lies in a tar, in bytes.
    """

    path: str
    data: bytes | None = None
    error: str | None = None
    offset: int = 0
    size: int = 0


# --- text that no column chokes on -----------------------------------------------------------------------------------


def clean_name(name: str) -> str:
    """A name as it can be stored and shown: no control characters, no stray surrogates, of bounded length."""
    shown = name.encode("utf-8", "backslashreplace").decode()
    shown = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", "\ufffd", shown)
    return shown if len(shown) <= MAX_NAME_CHARACTERS else shown[: MAX_NAME_CHARACTERS - 1] + "…"


def clean_text(text: str) -> str:
    """Stripped, with stray surrogates (JSON's \\ud800) replaced, which neither UTF-8 nor Parquet can hold."""
    return text.strip().encode("utf-8", "replace").decode()


def decoded_text(data: bytes) -> str:
    """`data` as UTF-8. Raises ValueError with a reason."""
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"larger than {MAX_TEXT_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if "\0" in text:
        raise ValueError("not text: it holds NUL bytes")
    return text


def one_line(problem: BaseException) -> str:
    """A reason from an error, the same on every machine: an OSError's own words name paths, so its kind is told."""
    if isinstance(problem, OSError) and problem.errno and problem.strerror:
        import os

        return os.strerror(problem.errno)
    return clean_name((str(problem).splitlines() or [""])[0])[:120] or type(problem).__name__


def describe(sample: Sample, metadata: Any) -> None:
    """Captions, URL, id and what else is known from a row or JSON member, under the names datasets give them.

    A status other than success (img2dataset's rows for what could not be downloaded) becomes the sample's error.
    """
    if not isinstance(metadata, Mapping):
        return
    caption = _first(metadata, CAPTION_ALIASES)
    if isinstance(caption, str):
        if sample.caption is None:
            sample.caption = _bounded(sample, caption)
        else:
            sample.alternatives.append(_bounded(sample, caption))
    more = metadata.get("captions")
    others = [metadata.get("re_caption"), *(more[:MAX_CAPTIONS] if isinstance(more, list) else ())]
    sample.alternatives.extend(_bounded(sample, text) for text in others if isinstance(text, str))
    url = _first(metadata, URL_ALIASES)
    sample.url = sample.url or (clean_text(url)[:4096] if isinstance(url, str) else None)
    source_uid = _first(metadata, SOURCE_UID_ALIASES)
    if sample.source_uid is None and isinstance(source_uid, str | int):
        sample.source_uid = clean_name(str(source_uid))[:200]
    for name, aliases in METADATA_ALIASES.items():
        value = _first(metadata, aliases)
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            value = ", ".join(value)
        if isinstance(value, str | int | float) and name not in sample.metadata:
            sample.metadata[name] = clean_text(value)[:2048] if isinstance(value, str) else value
    status = metadata.get("status")
    if isinstance(status, str) and status != "success":
        message = metadata.get("error_message")
        told = f"{status}: {message}" if message else status
        sample.error = sample.error or clean_name(told)[:200]


def _bounded(sample: Sample, text: str) -> str:
    if len(text) > MAX_TEXT_BYTES:
        sample.error = sample.error or f"unreadable caption: larger than {MAX_TEXT_BYTES} bytes"
        text = text[:MAX_NAME_CHARACTERS]
    return clean_text(text)


def _first(metadata: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((metadata[name] for name in names if metadata.get(name) is not None), None)


# --- members to samples ----------------------------------------------------------------------------------------------


def group_key(path: str) -> str:
    """WebDataset's key: the path up to the first dot of its last part."""
    parent, slash, name = path.rpartition("/")
    return f"{parent}{slash}{name.partition('.')[0]}"


def stem_of(path: str) -> str:
    """The path without the last extension of its last part."""
    return str(PurePosixPath(path).with_suffix("")) if PurePosixPath(path).name else path


def _extension(path: str) -> str:
    return PurePosixPath(path).suffix.lower().lstrip(".")


def samples_of(members: Iterable[Member]) -> Iterator[Sample]:
    """Group consecutive members by key, and each group into its samples. A name that comes again begins a new group."""
    group: list[Member] = []
    held = 0
    for member in members:
        names = {other.path for other in group}
        starts = not group or group_key(member.path) != group_key(group[0].path) or member.path in names
        if group and (not member.path or starts):
            yield from _group_samples(group)
            group, held = [], 0
        if not member.path:
            yield Sample(key="", error=member.error)
            continue
        size = len(member.data or b"")
        if len(group) >= MAX_GROUP_MEMBERS or (group and held + size > MAX_GROUP_BYTES):
            yield _failed(member, "too many members or bytes under one key")
            continue
        group.append(member)
        held += size
    if group:
        yield from _group_samples(group)


def _failed(member: Member, reason: str) -> Sample:
    return Sample(clean_name(group_key(member.path)), clean_name(member.path), error=reason)


def _group_samples(group: list[Member]) -> Iterator[Sample]:
    """A group's pictures, each with the texts of its own stem, else the group's; and what is wrong with the rest."""
    pictures = [member for member in group if _is_picture(member)]
    others = [member for member in group if not _is_picture(member)]
    claimed: set[int] = set()
    for picture in pictures:
        sample = Sample(clean_name(group_key(picture.path)), clean_name(picture.path), picture.data)
        sample.error = picture.error
        mine = _texts_for(picture, others, alone=len(pictures) == 1)
        claimed.update(id(member) for member in mine)
        _add_texts(sample, mine)
        yield sample
    for member in others:
        if _extension(member.path) not in SIDECAR_EXTENSIONS or member.error:
            yield _failed(member, member.error or "not an image of a known format")
        elif pictures and id(member) not in claimed and _extension(member.path) in CAPTION_EXTENSIONS:
            yield _failed(member, "no image beside it")
    strangers = any(_extension(member.path) not in SIDECAR_EXTENSIONS or member.error for member in others)
    if not pictures and not strangers:
        sample = _failed(group[0], "no image beside it")
        _add_texts(sample, others)
        yield sample


def _is_picture(member: Member) -> bool:
    extension = _extension(member.path)
    if extension in IMAGE_EXTENSIONS:
        return True
    # Bytes are what a decoder reads: a JPEG under an unknown name is still a picture.
    return extension not in SIDECAR_EXTENSIONS and member.data is not None and sniff(member.data) is not None


def _texts_for(picture: Member, others: list[Member], alone: bool) -> list[Member]:
    """Members of the picture's own stem, then those of the bare key; where it is the only picture, then the rest."""
    own, key = stem_of(picture.path), group_key(picture.path)
    ranked = [(0 if stem_of(other.path) == own else 1 if stem_of(other.path) == key else 2, other) for other in others]
    return [other for rank, other in sorted(ranked, key=lambda item: item[0]) if rank < 2 or alone]


def _add_texts(sample: Sample, others: Iterable[Member]) -> None:
    for member in others:
        extension = _extension(member.path)
        if member.data is None or (extension not in CAPTION_EXTENSIONS and extension != "json"):
            continue
        try:
            text = decoded_text(member.data)
            if extension == "json":
                describe(sample, json.loads(text))
            elif sample.caption is None:
                sample.caption = clean_text(text)
        except (ValueError, RecursionError) as problem:
            kind = "metadata" if extension == "json" else "caption"
            sample.error = sample.error or f"unreadable {kind}: {one_line(problem)}"
