"""Prompt files: each kind is recognised, hostile ones are refused with the line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from training.evaluation.suites import Asked, Prompt, SuiteError, read_suite

GENEVAL = [
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}],
     "prompt": "a photo of two clocks"},
    {"tag": "position", "include": [{"class": "bed", "count": 1}, {"class": "dog", "count": 1, "position":
     ["right of", 0]}], "prompt": "a photo of a dog right of a bed"},
]  # fmt: skip


def test_geneval_lines(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in GENEVAL))
    suite = read_suite(path)
    assert suite.kind == "geneval"
    counting, position = suite.prompts
    assert (counting.category, counting.asked, counting.forbidden) == (
        "counting", (Asked("clock", 2),), (Asked("clock", 3),)
    )  # fmt: skip
    assert position.asked[1] == Asked("dog", 1, "", "right of", 0)
    assert Prompt.from_json(json.loads(json.dumps(position.to_json()))) == position


def test_partiprompts_keep_their_quotation_marks(tmp_path: Path) -> None:
    path = tmp_path / "parti.tsv"
    path.write_text('Prompt\tCategory\tChallenge\tNote\na sign "Stop\tSigns\tBasic\t\ntwo cats\tAnimals\tQuantity\t\n')
    suite = read_suite(path)
    assert (suite.kind, [prompt.text for prompt in suite.prompts]) == ("parti", ['a sign "Stop', "two cats"])
    assert [prompt.category for prompt in suite.prompts] == ["Signs", "Animals"]


def test_compbench_and_user_files(tmp_path: Path) -> None:
    (tmp_path / "color_val.txt").write_text("a green bench and a red car\n\na blue bowl\n")
    (tmp_path / "mine.txt").write_text("\ufeff# my prompts\na cat\n")
    compbench, mine = read_suite(tmp_path / "color_val.txt"), read_suite(tmp_path / "mine.txt")
    assert (compbench.kind, compbench.prompts[1].category) == ("t2i_compbench", "color")
    assert (mine.kind, [prompt.text for prompt in mine.prompts]) == ("user", ["a cat"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "include": [{"class": "a", "position": ["inside", 0]}]}', "line 1.*position"),
        ('{"prompt": "a", "include": [{"class": "a", "position": ["above", 7]}]}', "entry 7 of 1"),
        ('{"prompt": "a", "include": [{"class": "a", "count": 0}]}', "count 0"),
        ('{"prompt": ["a"]}', "1 to 4,000 characters"),
        ('{"prompt": "' + "x" * 5000 + '"}', "1 to 4,000 characters"),
        ("{broken", "line 1: not a prompt in JSON"),
        ("# only a comment", "no prompt in it"),
    ],
)
def test_what_does_not_fit_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(line)
    with pytest.raises(SuiteError, match=said):
        read_suite(path)


def test_binary_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(SuiteError, match="UTF-8"):
        read_suite(tmp_path / "x.txt")


def test_the_real_files(shared_data: Path) -> None:
    geneval = read_suite(shared_data / "prompts/geneval/prompts/evaluation_metadata.jsonl")
    parti = read_suite(shared_data / "prompts/parti/PartiPrompts.tsv")
    assert Counter(prompt.category for prompt in geneval.prompts) == {
        "position": 100, "color_attr": 100, "two_object": 99, "colors": 94, "single_object": 80, "counting": 80,
    }  # fmt: skip
    assert all(prompt.checkable for prompt in geneval.prompts)
    assert len(parti.prompts) == 1632
    assert len({prompt.category for prompt in parti.prompts}) == 12
