"""A small model in the real format, through the real loading code: answers, seeds, ends and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare

from stages.captioners import Sampling, VisionLanguageModel, _seeded_noise, open_vlm
from tests.pipelines.raw import picture
from tests.stages.small_vlm import write_vlm

SAMPLED = Sampling(max_tokens=12, temperature=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def model(folder: Path) -> VisionLanguageModel:
    return open_vlm(folder, dtype="float32")


PICTURES: list[Image.Image] = [picture(number) for number in range(6)]
PROMPTS = ["Describe the picture .", "a short picture"] * 3


def test_answers_are_what_generate_gives(model: VisionLanguageModel) -> None:
    """One picture at a time, without padding, straight through the model's own greedy search."""
    answers = model.ask(PICTURES, PROMPTS, Sampling(max_tokens=8))
    for one, prompt, answer in zip(PICTURES, PROMPTS, answers, strict=True):
        inputs = model.processor(text=f"USER : <image> {prompt} ASSISTANT : ", images=one, return_tensors="pt")
        tokens = model.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        ended = 2 in tokens.tolist()
        assert answer.text == model.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert answer.status == ("success" if ended else "truncated")
        assert answer.completion_tokens == len(tokens)
        assert answer.prompt_tokens == inputs["input_ids"].shape[1]


def test_a_seeded_answer_does_not_depend_on_its_neighbours(model: VisionLanguageModel) -> None:
    together = model.ask(PICTURES, PROMPTS, SAMPLED, seeds=[7, 8, 9, 10, 11, 12])
    alone = [model.ask([PICTURES[n]], [PROMPTS[n]], SAMPLED, seeds=[7 + n])[0] for n in range(6)]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert together != model.ask(PICTURES, PROMPTS, SAMPLED, seeds=[1, 2, 3, 4, 5, 6])


def test_pictures_decide_answers(model: VisionLanguageModel) -> None:
    plain = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "white", "black")]
    answers = model.ask(plain, ["Describe the picture ."] * 4, Sampling(max_tokens=12))
    assert len({answer.text for answer in answers}) > 1


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_seeded_noise_draws_from_the_softmax(top_p: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampling = Sampling(temperature=0.8, top_p=top_p)
    process = _seeded_noise(sampling, range(20_000))
    drawn = Counter(process(torch.zeros(20_000, 1), logits.expand(20_000, 4)).argmax(1).tolist())
    expected = torch.softmax(logits / 0.8, 0).double().numpy()
    if top_p < 1:  # the smallest set of likeliest tokens that reaches 0.7: the first alone has 0.72
        expected = np.array([1.0, 0, 0, 0])
    kept = [place for place, share in enumerate(expected) if share > 0]
    assert set(drawn) <= set(kept)
    expected = expected / expected.sum()
    if len(kept) > 1:
        assert chisquare([drawn[place] for place in kept], [20_000 * expected[place] for place in kept]).pvalue > 1e-6


def test_bf16_is_what_a_recipe_gets(folder: Path) -> None:
    model = open_vlm(folder)
    assert model.model.dtype == torch.bfloat16
    assert model.ask(PICTURES[:1], PROMPTS[:1], Sampling(max_tokens=3))[0].completion_tokens <= 3


def test_the_digest_follows_the_weights(folder: Path, tmp_path: Path, model: VisionLanguageModel) -> None:
    assert open_vlm(write_vlm(tmp_path / "same"), dtype="float32").digest == model.digest
    assert open_vlm(write_vlm(tmp_path / "other", seed=1), dtype="float32").digest != model.digest


def test_folders_that_are_no_captioner_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a folder"):
        open_vlm(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        open_vlm(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        open_vlm(write_vlm(tmp_path / "plain", template=False))
