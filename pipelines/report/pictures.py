"""Pictures for reports: original bytes found again by (shard, key, member, index), and small thumbnails as data URIs.

Bytes are looked for where the raw shard lay when the snapshot was made, then in the snapshot's own shards. They are
shown only if they still are the bytes that were judged: a file that changed since has another digest, and the page says
so.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from cluster.storage import Folder, resolve
from pipelines.lineage.ledger import Ledger
from pipelines.readers.tables import image_column, is_inside, parquet_rows
from pipelines.readers.tar import tar_places

# images(shard digest, key, member, index in the shard) -> encoded bytes, or None where they are gone.
Images = Callable[[str, str, str | None, int], bytes | None]

THUMBNAIL_SIDE = 176
LARGEST_BYTES = 64 << 20
LARGEST_PIXELS = 120_000_000
# Of a row that came without a picture: a caption alone.
NO_PICTURE = "none"


@dataclass(frozen=True)
class Thumbnail:
    """A picture to put into a page, or the reason why there is none. tiny: it is shown enlarged, pixel by pixel."""

    uri: str = ""
    width: int = 0
    height: int = 0
    tiny: bool = False
    problem: str = ""


def thumbnail(data: bytes | None, side: int = THUMBNAIL_SIDE) -> Thumbnail:
    """A JPEG data URI at most `side` pixels wide and high; pictures that small already are kept exactly, as PNG."""
    from PIL import Image, ImageOps

    if data is None:
        return Thumbnail(problem="not found")
    if len(data) > LARGEST_BYTES:
        return Thumbnail(problem="too large to show")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture: Image.Image = Image.open(io.BytesIO(data))
            if picture.width * picture.height > LARGEST_PIXELS:
                return Thumbnail(problem="too large to show")
            picture.draft("RGB", (side * 2, side * 2))
            picture = ImageOps.exif_transpose(picture)
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                ground = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(ground, picture.convert("RGBA"))
            picture = picture.convert("RGB")
            tiny = max(picture.size) <= 80
            picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    except Exception:  # decoders raise nearly anything for damaged files
        return Thumbnail(problem="does not open")
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True) if tiny else picture.save(out, "JPEG", quality=76, optimize=True)
    uri = f"data:image/{'png' if tiny else 'jpeg'};base64,{base64.b64encode(out.getvalue()).decode()}"
    return Thumbnail(uri, picture.width, picture.height, tiny)


def row_thumbnail(images: Images, row: Mapping[str, Any], side: int = THUMBNAIL_SIDE) -> Thumbnail:
    """The thumbnail of a ledger row, if its bytes are found and still are the bytes that were judged."""
    if "image_id" in row and row["image_id"] is None:
        return Thumbnail(problem=NO_PICTURE)
    try:
        data = images(row["shard"], row["key"] or "", row.get("member"), row["index"])
    except (OSError, ValueError):
        data = None
    if data is not None and row.get("image_id") and hashlib.sha256(data).hexdigest()[:32] != row["image_id"]:
        return Thumbnail(problem="changed since")
    return thumbnail(data, side)


class SnapshotImages:
    """The `Images` of an open snapshot: raw shards first, then the shards that the snapshot packed."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._tars: dict[str, dict[str, tuple[int, int]]] = {}

    def __call__(self, shard: str, key: str, member: str | None, index: int) -> bytes | None:
        address = str(self.ledger.inputs.get(shard, {}).get("address") or "")
        data = None
        if address:
            try:
                data = self._raw(address, member, index)
            except (OSError, ValueError):
                data = None
        return data if data is not None else self._packed(shard, index)

    def _raw(self, address: str, member: str | None, index: int) -> bytes | None:
        if address.lower().endswith((".parquet", ".pq")):
            return _parquet_image(address, index)
        if not member:
            return None
        if address.lower().endswith(".tar"):
            return self._tar_member(address, member)
        folder = Folder(address)
        return folder.read(member) if folder.is_file(member) and is_inside(folder, member) else None

    def _packed(self, shard: str, index: int) -> bytes | None:
        rows = self.ledger.rows(
            "SELECT output_shard, output_key FROM ledger WHERE shard = ? AND \"index\" = ? AND verdict = 'kept'",
            [shard, index],
        )
        if not rows or not rows[0]["output_shard"]:
            return None
        address = self.ledger.folder.address(rows[0]["output_shard"])
        try:
            names = self._members(address)
            wanted = rows[0]["output_key"] + "."
            name = next((one for one in names if one.startswith(wanted) and not one.endswith((".txt", ".json"))), None)
            return self._tar_member(address, name) if name else None
        except OSError:
            return None

    def _members(self, address: str) -> dict[str, tuple[int, int]]:
        """Where each member's bytes lie in a tar; headers are read once, contents are not."""
        if address not in self._tars:
            self._tars[address] = tar_places(*resolve(address))
        return self._tars[address]

    def _tar_member(self, address: str, member: str) -> bytes | None:
        place = self._members(address).get(member)
        if place is None or place[1] > LARGEST_BYTES:
            return None
        filesystem, path = resolve(address)
        with filesystem.open_input_file(path) as stream:
            return bytes(stream.read_at(place[1], place[0]))


def _parquet_image(address: str, index: int) -> bytes | None:
    """The image bytes of row `index` of a Parquet file; only its group and column are read, a few rows at once."""
    filesystem, path = resolve(address)
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        column = image_column(file.schema_arrow)
        group, first = 0, 0
        while group < file.num_row_groups and index >= first + file.metadata.row_group(group).num_rows:
            first += file.metadata.row_group(group).num_rows
            group += 1
    if column is None or group == file.num_row_groups:
        return None
    row = next(itertools.islice(parquet_rows(address, [column], [group]), index - first, None), {column: None})
    value = row[column]
    return value.get("bytes") if isinstance(value, dict) else value
