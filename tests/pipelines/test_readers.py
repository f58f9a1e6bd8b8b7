"""Readers: one sample for every picture, one reason for everything else."""

import io
import tarfile

import pytest

from pipelines.readers import InputShard, discover, read
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


def test_parquet_without_pictures_says_what_it_has(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"url": ["http://h/i.jpg"], "caption": ["c"]}), tmp_path / "0.parquet")
    (sample,) = samples(tmp_path / "0.parquet")
    assert sample.error == "http images are not downloaded here: use img2dataset and give its output"


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
