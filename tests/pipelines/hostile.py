"""Inputs made to hurt: a file for each trick, and what has to come of its rows.

`CASES[name]` builds one input file or folder and says which rows must come out of it: member (as recorded) ->
(verdict, a pattern of the reason). A member "" stands for the container itself.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, PngImagePlugin

from tests.pipelines import raw

KEPT = ("kept", None)
Expected = dict[str, tuple[str, str | None]]


@dataclass(frozen=True)
class Case:
    """suffix: of the file that `build(path)` writes. rows: what has to be there; others: how many rows more may be."""

    suffix: str
    build: Callable[[Path], None]
    rows: Expected
    captions: dict[str, str | None] = field(default_factory=dict)


CASES: dict[str, Case] = {}


def picture(name: str) -> bytes:
    return raw.jpeg(raw.picture(zlib.crc32(name.encode())))


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", size: int | None = None
) -> bytes:
    """One tar member, header and padded data; `size` is what the header claims where that is a lie."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, link, len(data) if size is None else size
    return entry.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + data + b"\0" * (-len(data) % 512)


def header_with(name: str, field_at: int, value: bytes) -> bytes:
    """A header with one field overwritten, its checksum made right again."""
    block = bytearray(member(name)[:512])
    block[field_at : field_at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records: bytes) -> bytes:
    return member("pax", records, tarfile.XHDTYPE)


def record(key: str, value: str) -> bytes:
    text = f" {key}={value}\n"
    length = len(text)
    while len(str(length)) + len(text) != length:
        length = len(str(length)) + len(text)
    return f"{length}{text}".encode()


END = b"\0" * 1024


def tar(
    name: str,
    body: bytes | Callable[[], bytes],
    rows: Expected,
    captions: dict[str, str | None] | None = None,
    good: bool = True,
    end: bytes = END,
) -> None:
    """A tar whose first sample, good.jpg, is blameless, before the trick."""
    first = member("good.jpg", picture(name)) + member("good.txt", b"a blameless caption") if good else b""
    expected = {"good.jpg": KEPT, **rows} if good else rows

    def build(path: Path) -> None:
        path.write_bytes(first + (body() if callable(body) else body) + end)

    CASES[name] = Case(".tar", build, expected, captions or {})


def sample(key: str, data: bytes, caption: bytes = b"words of a caption") -> bytes:
    return member(f"{key}.jpg", data) + member(f"{key}.txt", caption)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims `width` x `height`."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


class Bomb:
    """Unpickled, it leaves a file beside the process."""

    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


# --- bytes that are no picture, or one nobody should open ------------------------------------------------------------

tar("corrupt_member", sample("a", picture("x")[:-300]), {"a.jpg": ("failed", "does not decode: .*truncated")})
tar("garbage_as_jpg", sample("a", b"garbage " * 90), {"a.jpg": ("failed", "not an image of a known format")})
tar("html_as_jpg", sample("a", b"<script>alert(1)</script>"), {"a.jpg": ("failed", "not an image of a known format")})
tar("zero_bytes", sample("a", b""), {"a.jpg": ("failed", "no image bytes")})
tar("svg_of_entities", member("a.svg", b'<!DOCTYPE s [<!ENTITY a "&b;&b;">]><svg>&a;</svg>'),
    {"a.svg": ("failed", "not an image of a known format")})  # fmt: skip
tar("pixel_bomb", sample("a", png_claiming(60_000, 60_000)), {"a.jpg": ("failed", "too many pixels")})
tar("pixel_bomb_beyond_int", sample("a", png_claiming(2**31 - 1, 2**31 - 1)), {"a.jpg": ("failed", ".")})


def text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "A" * 80_000_000, zip=True)
    return encoded(raw.picture(5), "PNG", pnginfo=info)


tar("text_chunk_bomb", lambda: sample("a", text_bomb()), {"a.jpg": ("failed", "(?i)too large|too much|decompress")})
BROKEN_EXIF = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12" * 40
tar("broken_exif", sample("a", encoded(raw.picture(77), "JPEG", exif=BROKEN_EXIF)), {"a.jpg": KEPT})

# --- pictures of unusual kinds, all to be kept -----------------------------------------------------------------------


def unusual() -> bytes:
    colour = [raw.picture(100 + place) for place in range(8)]
    grey16 = Image.fromarray(np.asarray(colour[1].convert("L"), np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = colour[4].convert("RGBA")
    alpha.putalpha(colour[5].convert("L"))
    frames = [raw.picture(200 + place) for place in range(3)]
    made = {
        "cmyk.jpg": encoded(colour[0].convert("CMYK"), "JPEG"),
        "grey16.png": encoded(grey16, "PNG"),
        "turned.jpg": encoded(colour[2], "JPEG", exif=turned),
        "palette.png": encoded(colour[3].convert("P"), "PNG", transparency=0),
        "alpha.png": encoded(alpha, "PNG"),
        "moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "moving.webp": encoded(frames[2], "WEBP", save_all=True, append_images=frames[:2]),
        "bits.tiff": encoded(colour[6].convert("1"), "TIFF"),
        "float.tiff": encoded(colour[7].convert("F"), "TIFF"),
    }
    return b"".join(member(name, data) for name, data in made.items())


UNUSUAL = "cmyk.jpg grey16.png turned.jpg palette.png alpha.png moving.gif moving.webp bits.tiff float.tiff"
tar("unusual_pictures", unusual, dict.fromkeys(UNUSUAL.split(), KEPT))

# --- tars that are not what they say ---------------------------------------------------------------------------------

BROKEN = "damaged tar: it breaks off"
tar("truncated_data", member("a.jpg", picture("y"))[:700], {"": ("failed", BROKEN)}, end=b"")
tar("truncated_header", member("a.jpg")[:300], {"": ("failed", BROKEN)}, end=b"")
tar("no_end_mark", b"", {"": ("failed", BROKEN)}, end=b"")
tar("spoilt_header", b"\x01" * 512 + sample("a", picture("z")), {"": ("failed", "damaged tar: unreadable header")})
tar("empty_file", b"", {"": ("failed", "damaged tar: it is empty")}, good=False, end=b"")
tar("not_a_tar", b"what is this " * 200, {"": ("failed", "damaged tar: unreadable header")}, good=False)
tar("second_tar_behind", END + sample("b", picture("behind")), {"": ("failed", "data after its end mark")})
tar("size_of_terabytes", member("a.jpg", b"", size=9 << 40), {"": ("failed", BROKEN)})
tar("negative_size", header_with("a.jpg", 124, b"\xff" * 12), {"": ("failed", "a negative size")})
tar("negative_pax_size", pax(record("size", "-1024")) + sample("a", picture("q")),
    {"": ("failed", "a size that is no number")})  # fmt: skip
tar("endless_pax_size", pax(record("size", "9" * 4400)) + sample("a", picture("q")),
    {"": ("failed", "a size that is no number")})  # fmt: skip
tar("pax_header_of_a_megabyte", pax(record("path", "a" * (1 << 20) + ".jpg")) + sample("a", picture("p")),
    {"a.jpg": ("failed", "extended header larger than")})  # fmt: skip
tar("pax_header_of_digits", pax(b"1" * 60_000) + sample("a", picture("d")), {"a.jpg": KEPT})
tar("pax_chain", pax(record("comment", "x")) * 5000 + sample("a", picture("c")), {"a.jpg": KEPT})
tar("long_name_of_gigabytes", member("x", b"", tarfile.GNUTYPE_LONGNAME, size=8 << 30), {"": ("failed", BROKEN)})
tar("pax_sparse", pax(record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") +
    record("GNU.sparse.realsize", str(1 << 50))) + sample("a", b"1\n0\n512\n".ljust(1024, b"\0")),
    {"a.jpg": ("failed", "a sparse member")})  # fmt: skip
tar("old_sparse", header_with("a.jpg", 156, tarfile.GNUTYPE_SPARSE), {"a.jpg": ("failed", "a sparse member")})


def large_member(path: Path) -> None:
    with path.open("wb") as stream:
        stream.write(sample("good", picture("large_member")) + member("a.jpg", b"", size=65 << 20))
        stream.seek(65 << 20, os.SEEK_CUR)
        stream.write(sample("b", picture("after large")) + END)


CASES["large_member"] = Case(".tar", large_member, {
    "good.jpg": KEPT, "a.jpg": ("failed", "member larger than"), "b.jpg": KEPT})  # fmt: skip


def gzip_bomb(path: Path) -> None:
    size = 256 << 20
    with gzip.open(path, "wb", 1) as stream:
        stream.write(sample("good", picture("gzip_bomb")) + member("a.jpg", b"", size=size))
        for _ in range(size >> 20):
            stream.write(bytes(1 << 20))
        stream.write(END)


CASES["gzip_bomb"] = Case(".tar.gz", gzip_bomb, {
    "good.jpg": KEPT, "": ("failed", "damaged tar: it expands to more than")})  # fmt: skip
CASES["gzip"] = Case(".tgz", lambda path: path.write_bytes(gzip.compress(sample("a", picture("gzip")) + END)),
                     {"a.jpg": KEPT})  # fmt: skip
CASES["gzip_broken_off"] = Case(
    ".tar.gz", lambda path: path.write_bytes(gzip.compress(sample("a", picture("gz2")) + END)[:900]),
    {"": ("failed", "damaged tar")})  # fmt: skip
CASES["gzip_named_tar"] = Case(".tar", lambda path: path.write_bytes(gzip.compress(sample("a", picture("gz3")) + END)),
                               {"a.jpg": KEPT})  # fmt: skip

# --- names -----------------------------------------------------------------------------------------------------------

tar("absolute_name", sample("/etc/cron.d/a", picture("abs")), {"etc/cron.d/a.jpg": KEPT})
tar("climbing_name", sample("../../../escape", picture("climb")), {"../../../escape.jpg": KEPT})
tar("shell_name", sample("$(touch EXECUTED);`id`", picture("shell")), {"$(touch EXECUTED);`id`.jpg": KEPT})
tar("sql_name", sample("'; DROP TABLE ledger; --", picture("sql")), {"'; DROP TABLE ledger; --.jpg": KEPT})
tar("control_name", sample("a\n\x1b[2Jb", picture("control")), {"a\ufffd\ufffd[2Jb.jpg": KEPT})
tar("latin_name", sample("caf\udce9", picture("latin")), {"caf\\udce9.jpg": KEPT})
tar("long_name", sample("n" * 5000, picture("long")), {"n" * 399 + "…": KEPT})
tar("symbolic_link", member("a.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"), {"a.jpg": ("failed", "not a regular")})
tar("hard_link", member("a.jpg", kind=tarfile.LNKTYPE, link="good.jpg"), {"a.jpg": ("failed", "not a regular")})
tar("device", member("a.jpg", kind=tarfile.CHRTYPE), {"a.jpg": ("failed", "not a regular")})
tar("pipe", member("a.jpg", kind=tarfile.FIFOTYPE), {"a.jpg": ("failed", "not a regular")})
tar("link_then_file", member("d", kind=tarfile.SYMTYPE, link="/tmp") + member("d/x.jpg", picture("through")),
    {"d": ("failed", "not a regular"), "d/x.jpg": KEPT})  # fmt: skip
tar("duplicate_keys", sample("a", picture("one"), b"the first") + sample("a", picture("two"), b"the second"),
    {"a.jpg": KEPT}, {"a.jpg": "the second"})  # fmt: skip
tar("duplicate_caption", sample("a", picture("cap")) + member("a.txt", b"another"), {
    "a.jpg": KEPT, "a.txt": ("failed", "no image beside it")})  # fmt: skip
tar("dotted_keys", sample("a.v1", picture("v1"), b"first") + sample("a.v2", picture("v2"), b"second"),
    {"a.v1.jpg": KEPT, "a.v2.jpg": KEPT}, {"a.v1.jpg": "first", "a.v2.jpg": "second"})  # fmt: skip
tar("dotted_key_without_caption", member("a.v1.jpg", picture("w1")) + sample("a.v2", picture("w2"), b"second"),
    {"a.v1.jpg": KEPT, "a.v2.jpg": KEPT}, {"a.v1.jpg": None, "a.v2.jpg": "second"})  # fmt: skip
tar("one_key_for_all", b"".join(member(f"a.{n}.jpg", picture(f"many{n}")) for n in range(70)),
    {"a.63.jpg": KEPT, "a.64.jpg": ("failed", "too many members or bytes under one key")})  # fmt: skip
tar("thousands_of_members", b"".join(member(f"{n}.jpg") for n in range(3000)), {"2999.jpg": ("failed", "no image")})
tar("stranger", member("a.exe", b"MZ" * 50), {"a.exe": ("failed", "not an image of a known format")})

# --- captions and metadata -------------------------------------------------------------------------------------------

tar("no_caption", member("a.jpg", picture("silent")), {"a.jpg": KEPT}, {"a.jpg": None})
tar("caption_alone", member("a.txt", b"words"), {"a.txt": ("failed", "no image beside it")})
tar("latin_caption", sample("a", picture("l1"), "déjà".encode("latin-1")), {"a.jpg": ("failed", "caption: not UTF-8")})
tar("utf16_caption", sample("a", picture("l2"), "words".encode("utf-16")), {"a.jpg": ("failed", "caption: not UTF-8")})
tar("utf16_caption_without_mark", sample("a", picture("l3"), "words".encode("utf-16-le")),
    {"a.jpg": ("failed", "NUL bytes")})  # fmt: skip
tar("caption_with_mark", sample("a", picture("l4"), "\ufeffwords".encode()), {"a.jpg": KEPT}, {"a.jpg": "words"})
HTML = "<img src=x onerror=alert(1)><script>alert('x')</script>"
tar("html_caption", sample("a", picture("l5"), HTML.encode()), {"a.jpg": KEPT}, {"a.jpg": HTML})
tar("terminal_caption", sample("a", picture("l6"), b"\x1b]0;owned\x07\x1b[2Jx"), {"a.jpg": KEPT},
    {"a.jpg": "\x1b]0;owned\x07\x1b[2Jx"})  # fmt: skip
tar("long_caption", sample("a", picture("l7"), b"word " * 100_000), {"a.jpg": KEPT})
tar("endless_caption", sample("a", picture("l8"), b"word " * 400_000), {"a.jpg": ("failed", "caption: larger than")})


def described(name: str, data: bytes) -> bytes:
    return member("a.jpg", picture(name)) + member("a.json", data)


tar("deep_json", described("j1", b"[" * 100_000), {"a.jpg": ("failed", "unreadable metadata")})
tar("not_json", described("j2", b"{'a': 1}"), {"a.jpg": ("failed", "unreadable metadata")})
tar("endless_number", described("j3", b'{"uid": ' + b"9" * 5000 + b"}"), {"a.jpg": ("failed", "unreadable metadata")})
tar("lone_surrogate", described("j4", b'{"caption": "a \\ud800 b", "url": "\\udfff"}'), {"a.jpg": KEPT},
    {"a.jpg": "a ? b"})  # fmt: skip
tar("json_of_other_types", described("j5", b'{"caption": 5, "url": [1], "uid": {}, "captions": "x", "width": NaN}'),
    {"a.jpg": KEPT})  # fmt: skip
tar("json_list", described("j6", b"[1, 2]"), {"a.jpg": KEPT})
tar("pickle_beside", sample("a", picture("k1")) + member("a.pkl", pickle.dumps(Bomb())), {"a.jpg": KEPT})
tar("pickle_as_array", sample("a", picture("k2")) + member("a.npy", pickle.dumps(Bomb())) +
    member("a.pth", pickle.dumps(Bomb())) + member("a.pyd", pickle.dumps(Bomb())), {"a.jpg": KEPT})  # fmt: skip
tar("pickle_alone", member("a.pkl", pickle.dumps(Bomb())), {"a.pkl": ("failed", "no image beside it")})
tar("pickle_as_jpg", sample("a", pickle.dumps(Bomb())), {"a.jpg": ("failed", "not an image of a known format")})
tar("status_failed", described("s1", json.dumps({"status": "failed_to_resize", "error_message": "x<b>"}).encode()),
    {"a.jpg": ("failed", "failed_to_resize: x<b>")})  # fmt: skip

# --- tables ----------------------------------------------------------------------------------------------------------


def table(name: str, columns: Callable[[], dict], rows: Expected, **options) -> None:
    CASES[name] = Case(".parquet", lambda path: pq.write_table(pa.table(columns()), path, **options), rows)


def file(name: str, suffix: str, content: bytes, rows: Expected) -> None:
    CASES[name] = Case(suffix, lambda path: path.write_bytes(content), rows)


file("not_parquet", ".parquet", b"PAR1 not really PAR1", {"": ("failed", "damaged parquet")})
file("empty_parquet", ".parquet", b"", {"": ("failed", "damaged parquet")})
table("null_bytes", lambda: {"image": pa.array([None, picture("t1")], pa.binary()), "key": ["n", "g"]}, {
    "#n": ("failed", "no image bytes"), "#g": KEPT})  # fmt: skip
table("status_rows", lambda: {"jpg": pa.array([None, picture("t2")], pa.binary()), "key": ["1", "2"], "status": [
    "failed_to_download", "success"], "error_message": ["404", None]}, {
    "#1": ("failed", "failed_to_download: 404"), "#2": KEPT})  # fmt: skip
table("column_bomb", lambda: {"image": [bytes(180_000_000)]}, {"": ("failed", "expands to more than")},
      compression="zstd")  # fmt: skip
table("one_cell_for_all", lambda: {"image": pa.array([picture("t3") + bytes(8 << 20)] * 40, pa.binary())}, {
    "#000000039": KEPT}, compression="zstd", data_page_size=1 << 30)  # fmt: skip
table("no_images", lambda: {"a\nb": [1]}, {"": ("failed", "no column of images, addresses or captions among a\ufffdb")})
table("odd_types", lambda: {"image": [picture("t4")], "caption": [b"bytes"], "uid": [[1, 2]], "url": [5]}, {
    "#000000000": KEPT})  # fmt: skip
table("web_addresses", lambda: {"URL": ["http://169.254.169.254/latest"], "TEXT": ["x"], "SAMPLE_ID": [7]}, {
    "#7": ("failed", "http images are not downloaded here")})  # fmt: skip
LISTED = (
    b"file_name,caption,key\n../secret.jpg,x,up\n/etc/passwd,x,absolute\nfile:///etc/passwd,x,url\nnowhere.jpg,x,missing\n"
    b"s3://bucket/a.jpg,x,elsewhere\nlink.jpg,x,link\n,x,none\nlisted.jpg,caf\xe9,latin\nlisted.jpg,fine,good\n"
    b'listed.jpg,"a, ""quoted"" word",quoted\n'
)
OUTSIDE = ("failed", "outside the folders")
file("paths.listed", ".csv", LISTED, {
    "#up": OUTSIDE, "#absolute": OUTSIDE, "#url": OUTSIDE, "#elsewhere": OUTSIDE, "#link": OUTSIDE,
    "#missing": ("failed", "no such file"), "#none": ("failed", "no image bytes"),
    "#latin": ("failed", "caption: not UTF-8"), "#good": KEPT, "#quoted": KEPT})  # fmt: skip
file("no_header", ".tsv", b"\n", {"": ("failed", "no column of addresses or captions")})
file("endless_line", ".tsv", b"url\tcaption\n" + b"x" * (5 << 20), {"": ("failed", "damaged tsv")})
file("nul_line", ".tsv", b"file_name\tkey\n\0.jpg\tnul\n", {"#nul": ("failed", "not an address of a file")})


def odd_folder(path: Path) -> None:
    """Links out and round, a pipe, a name that is no UTF-8, an empty file, beside a good picture."""
    path.mkdir()
    (path / "good.jpg").write_bytes(picture("folder"))
    (path / "good.txt").write_text("words")
    (path / "empty.jpg").touch()
    (path / "out.txt").symlink_to("/etc/hostname")
    (path / "out.jpg").symlink_to("/etc/hostname")
    (path / "round").symlink_to(path)
    os.mkfifo(path / "pipe.jpg")
    with open(os.fsencode(path) + b"/caf\xe9.jpg", "wb") as stream:
        stream.write(picture("folder latin"))


CASES["odd.folder"] = Case("", odd_folder, {
    "good.jpg": KEPT, "empty.jpg": ("failed", "no image bytes"),
    "out.jpg": ("failed", "a link that leads out of the folder"),
    "caf\\udce9.jpg": ("failed", "unreadable file: No such file")})  # fmt: skip
