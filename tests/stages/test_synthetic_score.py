"""Scores of captions of any length, against open_clip called directly on the chunks."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch

from pipelines.runner import SHIPPED_MODELS
from stages.clip_score import ClipScore
from stages.contract import Batch, Context
from stages.decode import EncodedImage
from stages.synthetic_score import SyntheticScore, chunks_of
from tests.pipelines import raw

CONTEXT = Context(models=(SHIPPED_MODELS,))
SENTENCE = "a red circle above a blue square."
LONG = " ".join([SENTENCE, "a large green triangle left of a small yellow star,", "white background."] * 20)


def measured(texts: list[list[str] | None], statuses: list[list[str] | None]) -> tuple[dict, list]:
    pictures = [EncodedImage(raw.jpeg(raw.picture(number))) for number in range(len(texts))]
    clip = ClipScore(model="clip").open(CONTEXT)
    images = clip(Batch({"caption": [SENTENCE] * len(texts)}, pictures))
    columns = {
        "clip.image_embedding": images.values["image_embedding"],
        "short.texts": texts,
        "short.statuses": statuses,
    }
    answer = SyntheticScore(of="short", model="clip").open(CONTEXT)(Batch(columns))
    return {**answer.values, "errors": answer.errors}, list(images.values["score"])


def test_a_short_caption_has_the_score_that_clip_score_gives() -> None:
    got, scores = measured([[SENTENCE]] * 3, [["success"]] * 3)
    assert [row[0] for row in got["scores"]] == pytest.approx(scores, abs=1e-3)
    assert got["errors"] == [None] * 3


def test_a_long_caption_is_the_mean_of_its_chunks_by_words() -> None:
    got, _ = measured([[LONG, SENTENCE]], [["success", "truncated"]])
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{SHIPPED_MODELS}/clip")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{SHIPPED_MODELS}/clip")
    count = lambda text: int((tokenizer([text], 4000) != tokenizer.tokenizer.pad_token_id).sum())  # noqa: E731
    chunks = chunks_of(LONG, count, tokenizer([""]).shape[1])
    assert len(chunks) > 3
    with torch.inference_mode():
        picture = preprocess(_reopened(0))[None]
        image_D = torch.nn.functional.normalize(model.eval().encode_image(picture), dim=-1)
        text_KD = torch.nn.functional.normalize(model.encode_text(tokenizer(chunks)), dim=-1)
    cosines = (text_KD @ image_D.T).squeeze(1).numpy()
    expected = np.average(cosines, weights=[len(chunk.split()) for chunk in chunks])
    assert got["scores"][0][0] == pytest.approx(expected, abs=1e-3)
    assert got["best"][0] == pytest.approx(max(got["scores"][0]))
    assert got["tokens"][0][0] == sum(map(count, chunks)) > tokenizer([""]).shape[1]


def _reopened(number: int):
    picture = EncodedImage(raw.jpeg(raw.picture(number))).picture()
    assert picture is not None
    return picture.convert("RGB")


def test_only_captions_that_are_there_are_scored() -> None:
    got, _ = measured([["", SENTENCE, "no"], None], [["error", "success", "refused"], None])
    assert [score is None for score in got["scores"][0]] == [True, False, True]
    assert got["scores"][1] is None
    assert got["errors"] == [None, "no short.texts"]


@pytest.mark.parametrize("limit", [4, 9, 30, 1000])
def test_chunks_fit_and_lose_nothing(limit: int) -> None:
    count = lambda text: len(text.split()) + 2  # noqa: E731
    chunks = chunks_of(LONG, count, limit)
    assert " ".join(chunks).split() == LONG.split()
    assert all(count(chunk) <= limit for chunk in chunks)
    # No two neighbours would have fitted together, but where a sentence was cut.
    if limit == 30:
        assert all(chunk.endswith((".", "background.")) for chunk in chunks)
