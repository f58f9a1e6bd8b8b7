"""Readers: one sample for every picture, one reason for everything else."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.readers import InputShard, discover, read, shard_digest
from pipelines.readers.subset import Subset, write_subset
from pipelines.recipe import Input, RecipeError
from tests.pipelines import raw

JPEG = raw.jpeg(raw.picture(1))


def samples(path) -> list:
    return list(read(discover(Input(str(path)))[0]))


def told(path) -> list[tuple[str, str, str | None]]:
    return [(sample.key, sample.member, sample.error) for sample in samples(path)]


def test_members_of_one_key_become_one_sample_with_caption_and_metadata(tmp_path):
    members = raw.sample("000", JPEG, " a dog ", id="x7", url="http://h/i.jpg", captions=["a dog", "a hound"])
    (sample,) = samples(raw.write_tar(tmp_path / "0.tar", members))
    assert (sample.caption, sample.alternatives, sample.source_uid, sample.url) == (
        "a dog",
        ["a hound"],
        "x7",
        "http://h/i.jpg",
    )
    assert sample.data == JPEG


def test_dots_in_names_do_not_merge_samples(tmp_path):
    members = [("a.v1.jpg", JPEG), ("a.v1.txt", b"first"), ("a.v2.jpg", JPEG), ("a.v2.txt", b"second")]
    found = samples(raw.write_tar(tmp_path / "0.tar", members))
    assert [(sample.member, sample.caption) for sample in found] == [("a.v1.jpg", "first"), ("a.v2.jpg", "second")]


def test_everything_that_is_no_picture_leaves_a_reason(tmp_path):
    members = [
        ("a.jpg", JPEG),
        ("LICENSE", b"some words"),
        ("b.txt", b"a caption alone"),
        ("c.svg", JPEG),
        ("d.exe", b"MZ"),
        ("e.jpg", JPEG),
        ("e.txt", b"\xff\xfe\xfa not text"),
        ("f.jpg", JPEG),
        ("f.json", b"[" * 100_000),
    ]
    assert told(raw.write_tar(tmp_path / "0.tar", members)) == [
        ("a", "a.jpg", None),
        ("LICENSE", "LICENSE", "not an image of a known format"),
        ("b", "b.txt", "no image beside it"),
        ("c", "c.svg", None),
        ("d", "d.exe", "not an image of a known format"),
        ("e", "e.jpg", "unreadable caption: not UTF-8"),
        ("f", "f.jpg", told(tmp_path / "0.tar")[-1][2]),
    ]
    assert told(tmp_path / "0.tar")[-1][2].startswith("unreadable metadata")


def test_links_devices_and_paths_that_climb_out_are_never_followed(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind, target in (
            ("a.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("b.jpg", tarfile.LNKTYPE, "a.jpg"),
            ("c.jpg", tarfile.CHRTYPE, ""),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            archive.addfile(entry)
        entry = tarfile.TarInfo("../../escape.jpg")
        entry.size = len(JPEG)
        archive.addfile(entry, io.BytesIO(JPEG))
    assert [error for _, _, error in told(path)] == ["not a regular file"] * 3 + [None]
    assert not (tmp_path.parent / "escape.jpg").exists()


@pytest.mark.parametrize("cut", [512 * 3, 700, 511, 1])
def test_a_tar_that_breaks_off_says_so_wherever_it_breaks(tmp_path, cut):
    whole = raw.write_tar(tmp_path / "0.tar", raw.sample("a", JPEG, "x") + raw.sample("b", JPEG, "y"))
    with tarfile.open(whole) as archive:
        end = archive.getmembers()[-1].offset_data
    whole.write_bytes(whole.read_bytes()[: end - cut])
    last = samples(whole)[-1]
    assert last.data is None
    assert last.error.startswith("damaged tar")


def test_a_whole_tar_has_no_reason_at_its_end(tmp_path):
    assert [error for _, _, error in told(raw.write_tar(tmp_path / "0.tar", raw.sample("a", JPEG, "x")))] == [None]


def test_bytes_that_are_no_tar_or_parquet_are_one_failed_row(tmp_path):
    for name in ("0.tar", "0.parquet"):
        (tmp_path / name).write_bytes(b"not what it says" * 100)
        (sample,) = samples(tmp_path / name)
        assert sample.error.startswith("damaged ")


def test_parquet_without_pictures_or_captions_says_what_it_has(tmp_path):
    pq.write_table(pa.table({"width": [1], "size": [1]}), tmp_path / "0.parquet")
    (sample,) = samples(tmp_path / "0.parquet")
    assert sample.error == "damaged parquet: no column of images, addresses or captions among width, size"


@pytest.mark.parametrize(
    ("columns", "url", "absent"),
    [
        ({"caption": ["c"]}, None, "no image bytes"),
        ({"url": ["https://h/i.jpg"], "caption": ["c"]}, "https://h/i.jpg",
         "https images are not downloaded here: use img2dataset and give its output"),
    ],
)  # fmt: skip
def test_rows_of_captions_alone_are_read_without_pictures(tmp_path, columns, url, absent):
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    (sample,) = samples(tmp_path / "0.parquet")
    assert (sample.error, sample.data, sample.caption, sample.url) == (None, None, "c", url)
    assert sample.absent == absent


def test_patterns_braces_and_folders_are_found_in_natural_order(tmp_path):
    for number in (0, 2, 10):
        raw.write_tar(tmp_path / f"{number}.tar", raw.sample("a", JPEG, "x"))
    expected = ["0.tar", "2.tar", "10.tar"]
    for url in (tmp_path, tmp_path / "*.tar", tmp_path / "{0,2,10}.tar"):
        assert [shard.name for shard in discover(Input(str(url)))] == expected


def test_a_place_without_data_is_refused_with_what_to_give(tmp_path):
    with pytest.raises(RecipeError, match="does not exist"):
        discover(Input(str(tmp_path / "nowhere")))
    with pytest.raises(RecipeError, match="give a file, a folder or a pattern"):
        discover(Input(str(tmp_path)))
    with pytest.raises(RecipeError, match="no input"):
        discover(Input())


def test_a_shard_description_survives_json():
    shard = InputShard("a", "/x/a", "folder", 5, 6, ("p/q.jpg",), 3)
    assert InputShard.from_json(shard.to_json() | {"members": list(shard.members)}) == shard


# --- the datasets people have ----------------------------------------------------------------------------------------

ROWS = {
    "datacomp": (
        {"uid": "ab" * 16, "url": "u", "text": "words", "original_width": 7, "clip_l14_similarity_score": 0.25,
         "sha256": "s"},
        ("ab" * 16, "words", {"width": 7, "clip_l14_score": 0.25, "hash": "s"}),
    ),
    "laion": (
        {"hash": -5, "URL": "u", "TEXT": "words", "WIDTH": 7, "similarity": 0.3, "punsafe": 0.1, "pwatermark": 0.2,
         "AESTHETIC_SCORE": 5.5, "LANGUAGE": "en"},
        ("-5", "words", {"width": 7, "clip_b32_score": 0.3, "unsafe": 0.1, "watermark": 0.2, "aesthetic": 5.5,
                         "language": "en", "hash": -5}),
    ),
    "coyo": (
        {"id": 9, "url": "u", "text": "words", "clip_similarity_vitb32": 0.3, "aesthetic_score_laion_v2": 5.5,
         "watermark_score": 0.2, "nsfw_score_opennsfw2": 0.1},
        ("9", "words", {"clip_b32_score": 0.3, "aesthetic": 5.5, "watermark": 0.2, "unsafe": 0.1}),
    ),
    "pd12m": (
        {"id": "x", "url": "u", "caption": "words", "width": 7, "hash": "md5", "license": "CC0",
         "mime_type": "image/jpeg"},
        ("x", "words", {"width": 7, "hash": "md5", "license": "CC0", "mime_type": "image/jpeg"}),
    ),
    "recap": (
        {"key": "k", "org_caption": "words", "re_caption": "more words", "org_clip_score": 0.3, "url": "u"},
        ("k", "words", {"clip_b32_score": 0.3}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_columns_of_known_datasets_are_understood(tmp_path, name):
    given, (source_uid, caption, metadata) = ROWS[name]
    pq.write_table(pa.table({key: [value] for key, value in {**given, "image": JPEG}.items()}), tmp_path / "0.parquet")
    (sample,) = samples(tmp_path / "0.parquet")
    assert (sample.data, sample.source_uid, sample.caption, sample.url) == (JPEG, source_uid, caption, "u")
    assert sample.metadata == metadata
    assert sample.alternatives == (["more words"] if name == "recap" else [])


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_tables_name_images_below_the_folders_they_may_name(tmp_path, kind):
    store = tmp_path / "images"
    (store / "sub").mkdir(parents=True)
    (store / "sub" / "a.jpg").write_bytes(JPEG)
    rows = {
        "path": ["sub/a.jpg", str(store / "sub/a.jpg"), f"file://{store}/sub/a.jpg", "/etc/passwd"],
        "TEXT": list("abcd"),
    }
    path = tmp_path / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(rows), path)
    else:
        mark = "," if kind == "csv" else "\t"
        path.write_text("\n".join(mark.join(cells) for cells in (rows, *zip(*rows.values(), strict=True))))
    (shard,) = discover(Input(str(path), images=(str(store),)))
    found = list(read(shard))
    assert [(sample.data, sample.caption) for sample in found] == [(JPEG, "a"), (JPEG, "b"), (JPEG, "c"), (None, "d")]
    assert found[3].error == "outside the folders that input.images allows"
    # The images are part of what the shard holds: one that changes is other input.
    before = shard_digest(shard)
    (store / "sub" / "a.jpg").write_bytes(raw.jpeg(raw.picture(2)))
    assert shard_digest(shard) != before


SIDECAR = {
    "key": ["000", "001", "002"],
    "status": ["success", "failed_to_download", "success"],
    "error_message": [None, "HTTP 404", None],
    "url": ["u0", "u1", "u2"],
    "caption": ["zero", "one", "two"],
}
FROM_SIDECAR = [
    ("000", "zero", "u0", None),
    ("001", "one", "u1", "failed_to_download: HTTP 404"),
    ("002", "two", "u2", "in the shard's parquet, but there is no image"),
]


@pytest.mark.parametrize("layout", ["webdataset", "files"])
def test_img2datasets_failures_are_rows_although_only_its_parquet_has_them(tmp_path, layout):
    pq.write_table(pa.table(SIDECAR), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    if layout == "webdataset":
        raw.write_tar(tmp_path / "00000.tar", raw.sample("000", JPEG, "zero"))
    else:
        (tmp_path / "00000").mkdir()
        (tmp_path / "00000" / "000.jpg").write_bytes(JPEG)
        (tmp_path / "00000" / "000.txt").write_text("zero")
    (shard,) = discover(Input(str(tmp_path)))
    found = [(sample.key.rpartition("/")[2], sample.caption, sample.url, sample.error) for sample in read(shard)]
    assert found == FROM_SIDECAR
    before = shard_digest(shard)
    pq.write_table(pa.table({**SIDECAR, "url": ["v0", "v1", "v2"]}), tmp_path / "00000.parquet")
    assert shard_digest(shard) != before


def test_a_sidecar_that_does_not_open_costs_no_sample(tmp_path):
    (tmp_path / "0.parquet").write_bytes(b"PAR1 not")
    raw.write_tar(tmp_path / "0.tar", raw.sample("000", JPEG, "zero"))
    assert [sample.error is None for sample in samples(tmp_path)] == [True, False]
    assert samples(tmp_path)[-1].error.startswith("damaged parquet beside the shard")


def test_several_inputs_are_told_apart_and_two_of_one_name_are_refused(tmp_path):
    for name in "ab":
        raw.write_tar(tmp_path / name / "0.tar", raw.sample(name, JPEG, name))
    both = [Input(str(tmp_path / "a"), name="old"), Input(str(tmp_path / "b"))]
    assert [shard.dataset for shard in discover(both)] == ["old", "input1"]
    with pytest.raises(RecipeError, match="two datasets are called 'old'"):
        discover([both[0], both[0]])


def test_a_subset_reads_its_uids_alone_and_each_as_often_as_it_stands_there(tmp_path):
    uids = [f"{number:016x}{7 * number:016x}" for number in range(4)]
    members = [member for number, uid in enumerate(uids) for member in raw.sample(f"{number}", JPEG, uid, uid=uid)]
    path = raw.write_tar(tmp_path / "0.tar", members)
    with (tmp_path / "subset.npy").open("wb") as stream:
        assert write_subset(stream, [uids[3], uids[1], uids[3], "no uid"]) == 3
    # As DataComp's own resharder loads and searches it.
    array = np.load(tmp_path / "subset.npy")
    assert array.dtype == np.dtype("u8,u8")
    assert array.tolist() == [(1, 7), (3, 21), (3, 21)]
    (shard,) = discover(Input(str(path), subset=str(tmp_path / "subset.npy")))
    assert [sample.source_uid for sample in read(shard)] == [uids[1], uids[3], uids[3]]
    assert shard_digest(shard) != shard_digest(discover(Input(str(path)))[0])


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([(2, 0), (1, 0)], "u8,u8"), "not sorted"),
        (np.array([1, 2]), "not a row of uids"),
        (np.array([{}], dtype=object), "no .npy array"),
    ],
)
def test_a_subset_that_is_none_is_refused(tmp_path, array, words):
    np.save(tmp_path / "subset.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=words):
        Subset.open(str(tmp_path / "subset.npy"))
