"""Known-bad pictures and opt-outs: every kind of entry, each with its own reason; wrong lists are told by line."""

from pathlib import Path

import numpy as np
import pytest

from stages.lists import KnownBad, OptOut, domain_of, is_under, read_entries, tags_of
from stages.rules import Rule

SHA = [f"{n:064x}" for n in range(6)]
IDS = [sha[:16] + sha[-16:] for sha in SHA]


def objects(*values):
    array = np.empty(len(values), object)
    array[:] = values
    return array


def table(**columns):
    return {"sha256": objects(*SHA), "image_id": objects(*IDS), "url": objects(*[None] * 6), **columns}


def listed(folder: Path, *lines: str) -> str:
    (folder / "list.txt").write_text("\n".join(lines) + "\n")
    return str(folder / "list.txt")


def reasons(rule: Rule, rows: dict) -> dict[int, str]:
    answer = rule.judge(rows)
    assert set(np.flatnonzero(answer.rejected)) == set(answer.reasons)
    return dict(answer.reasons)


def test_known_bad_by_digest_id_and_hash(tmp_path):
    hashes = np.array([0, 0b1, 0b111, 0b11111, 2**63, 2**64 - 1], np.uint64)
    file = listed(tmp_path, "# comment", "", SHA[5].upper(), IDS[4], "0000000000000000")
    found = reasons(KnownBad(file=file, phash="hash.phash64", radius=3), table(**{"hash.phash64": hashes}))
    assert found == {
        0: "known bad: pHash 0 bits away",
        1: "known bad: pHash 1 bits away",
        2: "known bad: pHash 3 bits away",
        4: "known bad: image_id",
        5: "known bad: sha256",
    }


def test_hashes_are_matched_as_a_naive_search_matches_them(tmp_path):
    rng = np.random.default_rng(0)
    bad = rng.integers(0, 2**64, 20, dtype=np.uint64)
    near, far = bad[:3] ^ np.uint64(1), bad[3:5] ^ np.uint64(0b11111)
    mine = np.concatenate([near, far, rng.integers(0, 2**64, 50, np.uint64)])
    file = listed(tmp_path, *(f"{int(one):016x}" for one in bad))
    rows = {name: objects(*[None] * len(mine)) for name in ("sha256", "image_id", "url")}
    answer = KnownBad(file=file, phash="h", radius=4).judge({**rows, "h": mine})
    naive = np.array([min(bin(int(a) ^ int(b)).count("1") for b in bad) for a in mine])
    assert answer.value.tolist() == naive.tolist()
    assert answer.rejected.tolist() == (naive <= 4).tolist()


def test_opt_outs_each_with_its_reason(tmp_path):
    file = listed(tmp_path, SHA[0], "https://example.com/a.jpg", "shop.example")
    urls = objects(None, "https://example.com/a.jpg", "http://cdn.SHOP.example:80/", "https://notshop.example", "", "u")
    tags = objects(None, None, None, "googlebot: NoAI, nofollow", '["noimageai"]', "all")
    licences = objects(*["CC-BY 4.0"] * 5, "all rights")
    rule = OptOut(file=file, tags="robots", licence="license", licences=("cc by 4.0",))
    assert reasons(rule, table(url=urls, robots=tags, license=licences)) == {
        0: "opt-out: on the takedown list",
        1: "opt-out: on the takedown list",
        2: "opt-out: domain shop.example",
        3: "opt-out: noai",
        4: "opt-out: noimageai",
        5: "opt-out: licence all rights",
    }


def test_tags_and_licences_are_found_in_what_a_dataset_says_of_a_row():
    both = '{"robots": "noai", "license": "cc0"}'
    told = objects(both, '{"license": "CC0"}', '{"license": ["x"]}', "not json", None, "[1]")
    rule = OptOut(tags="metadata.robots", licence="metadata.license", licences=("cc0",))
    assert rule.needs == ("sha256", "image_id", "url", "metadata")
    assert reasons(rule, table(metadata=told)) == {
        0: "opt-out: noai",
        2: "opt-out: licence ['x']",
        3: "opt-out: licence not given",
        4: "opt-out: licence not given",
        5: "opt-out: licence not given",
    }


def test_domains_reach_their_subdomains_and_no_others():
    domains = frozenset({"example.com"})
    assert is_under("a.b.example.com", domains) == "example.com"
    assert is_under("example.com.evil.net", domains) is None
    assert is_under("notexample.com", domains) is None
    assert domain_of("https://user:pw@Example.COM.:443/x") == "example.com"
    for odd in ("http://[", "", None, "no url", "https://"):
        assert domain_of(odd) == ""


def test_tags_in_any_notation():
    for value in ("noai", "NOAI,noindex", "bot: noai", '{"robots": ["noai"]}', ["noai"], "none;noai"):
        assert "noai" in tags_of(value)
    assert tags_of("noairport") == {"noairport"}
    assert tags_of(None) == frozenset()


def test_a_wrong_line_is_named_and_a_missing_file_told(tmp_path):
    with pytest.raises(ValueError, match=r"list\.txt, line 2: 'what is this' is neither"):
        KnownBad(file=listed(tmp_path, SHA[0], "what is this"))
    with pytest.raises(ValueError, match="is not there; give its path"):
        OptOut(file=str(tmp_path / "absent.txt"))
    with pytest.raises(ValueError, match="name their column"):
        KnownBad(file=listed(tmp_path, "0123456789abcdef"))
    with pytest.raises(ValueError, match="belong together"):
        OptOut(licence="license")
    with pytest.raises(ValueError, match="asks nothing"):
        OptOut()


def test_a_list_is_known_by_its_content_and_not_by_its_place(tmp_path):
    rule = KnownBad(file=listed(tmp_path, SHA[0]))
    assert rule.options()["file"] == "list.txt"
    read_entries.cache_clear()
    other = KnownBad(file=listed(tmp_path, SHA[1]))
    assert other.options()["digest"] != rule.options()["digest"]
    with pytest.raises(ValueError, match="has changed since"):
        read_entries(rule.file, rule.digest)
