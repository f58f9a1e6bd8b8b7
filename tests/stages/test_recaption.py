"""The recaption stage: what it asks, what it never asks twice, and what becomes of every row."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.measure import StageJob
from stages.answers import AnswerBook
from stages.captioners import Answer
from stages.contract import Batch, Context
from stages.decode import EncodedImage
from stages.openai_server import ServerError
from stages.recaption import Recaption
from tests.pipelines import raw
from tests.stages.chat_server import ChatServerForTests
from tests.stages.small_vlm import write_vlm


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_vlm(folder / "seer")
    (folder / "long.txt").write_text("Describe the picture .\n")
    return folder


def batch(*data: bytes | None) -> Batch:
    ids = [hashlib.sha256(one).hexdigest()[:32] if one else None for one in data]
    return Batch({"image_id": ids}, [EncodedImage(one) for one in data])


PICTURES = [raw.jpeg(raw.picture(number, (200, 100))) for number in range(5)]


def by_server(url: str, **options: Any) -> Recaption:
    return Recaption(**{"engine": "server", "server": url, "model": "seer", "max_tokens": 32, **options})


def test_a_folder_captions_with_several_prompts_and_captions_each(models: Path, tmp_path: Path) -> None:
    options = {"prompts": ("a picture", "@long.txt"), "captions": 2, "temperature": 1.0, "precision": "fp32"}
    stage = Recaption(model="seer", max_tokens=6, language="", model_batch=3, **options)
    context = Context(models=(str(models),), cache=str(tmp_path))
    answer = stage.open(context)(batch(*PICTURES)).values
    assert [len(row) for row in answer["texts"]] == [4] * 5
    assert {status for row in answer["statuses"] for status in row} <= {"success", "truncated", "error"}
    assert len({prompt for row in answer["prompts"] for prompt in row}) == 2
    # Another worker, another batch: everything is found, nothing asked, and the captions are the same.
    again = stage.open(context)
    assert again(batch(*PICTURES)).values == answer
    assert (again.spent["asked"], again.spent["recorded before"]) == (0, 20)  # type: ignore[attr-defined]
    # Recorded answers aside, the seeds decide: not the batch, not the order.
    other = stage.open(Context(models=(str(models),), cache=str(tmp_path / "other")))
    turned = other(batch(*PICTURES[::-1])).values
    assert turned["texts"][::-1] == answer["texts"]


def test_pictures_are_checked_before_a_model_sees_them(tmp_path: Path) -> None:
    data = [
        PICTURES[0],
        None,
        b"no picture at all",
        PICTURES[1][:-400],
        raw.jpeg(raw.picture(1, (8, 40))),
        raw.jpeg(raw.picture(2, (900, 30))),
    ]
    with ChatServerForTests() as server:
        answer = by_server(server.url).open(Context(cache=str(tmp_path)))(batch(*data)).values
        assert len(server.served) == 1
    assert [row[0] for row in answer["statuses"]] == ["success"] + ["skipped"] * 5
    reasons = [row[0] for row in answer["reasons"]]
    assert reasons[1] == "no image bytes"
    assert reasons[2] == "not an image of a known format"
    assert reasons[3].startswith("does not decode")
    assert reasons[4] == "short side 8 px, less than 16"
    assert reasons[5] == "aspect 30.0, more than 20"
    assert answer["succeeded"] == [1, 0, 0, 0, 0, 0]


def test_equal_pictures_are_paid_for_once_and_sent_small(tmp_path: Path) -> None:
    with ChatServerForTests() as server:
        measure = by_server(server.url, max_side=64).open(Context(cache=str(tmp_path)))
        answer = measure(batch(PICTURES[0], PICTURES[0], PICTURES[1])).values
        assert [one.side for one in server.served] == [64, 64]
    assert answer["texts"][0] == answer["texts"][1] != answer["texts"][2]
    assert measure.spent["tokens"] == 2 * 108  # type: ignore[attr-defined]


def test_errors_are_asked_again_and_answers_are_not(tmp_path: Path) -> None:
    def behave(number: int, text: str) -> str:
        return "bad request" if number == 0 else "well"

    with ChatServerForTests(behave) as server:
        stage, context = by_server(server.url), Context(cache=str(tmp_path))
        first = stage.open(context)(batch(*PICTURES)).values
        second = stage.open(context)(batch(*PICTURES)).values
        questions = Counter(one.question for one in server.served)
    assert sorted(status for row in first["statuses"] for status in row) == ["error"] + ["success"] * 4
    assert {status for row in second["statuses"] for status in row} == {"success"}
    assert sorted(questions.values()) == [1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    "change", [{"revision": "2"}, {"prompts": ("why?",)}, {"temperature": 0.5}, {"max_side": 99}, {"seed": 4}]
)
def test_what_is_asked_names_the_answer(change: dict[str, Any], tmp_path: Path) -> None:
    with ChatServerForTests() as server:
        for stage in (
            by_server(server.url),
            by_server(server.url, in_flight=3, language=""),
            by_server(server.url, **change),
        ):
            stage.open(Context(cache=str(tmp_path)))(batch(PICTURES[0]))
        assert len(server.served) == 2  # transport and cleaning ask nothing anew


def test_transport_is_no_part_of_a_recipe_that_repeats() -> None:
    one, other = by_server("http://a/v1"), by_server("http://b/v1", in_flight=2, usd_per_million_in=3.0)
    assert one.options() == other.options()
    assert one.identity() == other.identity() != by_server("http://a/v1", revision="2").identity()
    assert StageJob.from_json(StageJob("short", other).to_json()).stage == other


def test_a_server_that_is_not_there_is_told_when_the_stage_opens(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="no server answers"):
        by_server("http://127.0.0.1:9/v1").open(Context(cache=str(tmp_path)))
    with pytest.raises(ValueError, match="SLUICE_CAPTION_SERVER"):
        by_server("").open(Context(cache=str(tmp_path)))
    with pytest.raises(ValueError, match="folder to record answers in"):
        by_server("http://127.0.0.1:9/v1").open(Context())


def test_captions_that_could_only_be_equal_are_refused() -> None:
    with pytest.raises(ValueError, match="write a temperature"):
        Recaption(model="seer", captions=2)


def test_the_first_answer_of_a_key_stays(tmp_path: Path) -> None:
    book, other = AnswerBook(tmp_path), AnswerBook(tmp_path)
    book.record({"k": ("i", "m", Answer("success", "first", "", 3, 4))})
    other.record({"k": ("i", "m", Answer("success", "second", "", 5, 6)), "l": ("j", "m", Answer("success", "x"))})
    assert book.find(["k", "l", "none"]) == {"k": Answer("success", "first", "", 3, 4), "l": Answer("success", "x")}
    assert book.tokens("m") == (2, 1.5, 2.0)
    assert other.forget(["i"]) == 1
    assert set(book.find(["k", "l"])) == {"l"}
