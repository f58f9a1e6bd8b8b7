"""The shipped small models do what accuracy.json says, on pictures that neither training nor accuracy.json saw."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipelines.demo.small_models import WEIGHTS, auc, measure

SEED = 3_000_003


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads((WEIGHTS / "accuracy.json").read_text())


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return measure(seed=SEED, count=160)


def test_figures_hold_again_on_other_pictures(recorded: dict[str, Any], measured: dict[str, Any]) -> None:
    assert SEED not in (recorded["measured_on"]["seed"], recorded["measured_on"]["training_seed"])
    for model, names in {
        "clip": ("auc_swapped_caption", "auc_swapped_attributes", "auc_swapped_relation"),
        "aesthetic": ("auc_clean_above_ugly",),
    }.items():
        for name in names:
            # An AUC of 160 pictures has a standard error below 0.03 wherever it is above one half.
            assert measured[model][name] == pytest.approx(recorded[model][name], abs=0.08), name
    cosine = measured["text_encoder"]["other_colour_cosine"]
    assert cosine == pytest.approx(recorded["text_encoder"]["other_colour_cosine"], abs=0.05)


def test_the_text_encoder_has_not_forgotten_the_colour(measured: dict[str, Any]) -> None:
    # A plain language model of this world ends above 0.99: any colour may be followed by any word.
    assert measured["text_encoder"]["other_colour_cosine"] < 0.9


def test_clip_ranks_swapped_captions_below_true_ones(measured: dict[str, Any]) -> None:
    assert measured["clip"]["auc_swapped_caption"] >= 0.95


def test_the_aesthetic_head_scores_ugly_drawings_low_and_clean_ones_high(measured: dict[str, Any]) -> None:
    figures = measured["aesthetic"]
    # The small CLIP sees spoiling only dimly; docs/log.md has the figures.
    assert figures["auc_clean_above_ugly"] >= 0.7
    assert figures["mean_score_clean"] > figures["mean_score_ugly"] + 1


def test_weights_are_safetensors_of_a_few_megabytes() -> None:
    sizes = {file.relative_to(WEIGHTS).as_posix(): file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()}
    assert {"clip/open_clip_model.safetensors", "aesthetic/model.safetensors"} < set(sizes)
    assert not [name for name in sizes if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert sum(sizes.values()) < 6_000_000


def test_the_text_encoder_is_a_gemma_2_whose_features_depend_on_the_words_before() -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer, Gemma2Model

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "text_encoder")
    model = AutoModel.from_pretrained(WEIGHTS / "text_encoder").eval()
    assert isinstance(model, Gemma2Model)
    encoded = tokenizer(["a red circle above a blue square", "A Blue square above a red circle."], padding=True)
    first, second = encoded.input_ids
    assert first[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id in first
    assert tokenizer.unk_token_id not in first + second
    assert first[-1] == tokenizer.pad_token_id
    with torch.inference_mode():
        features = model(torch.tensor([first, second])).last_hidden_state
    assert features.dtype == torch.float32
    circle = features[0, first.index(tokenizer.convert_tokens_to_ids("circle"))]
    other = features[1, second.index(tokenizer.convert_tokens_to_ids("circle"))]
    assert torch.nn.functional.cosine_similarity(circle, other, dim=0) < 0.99


def test_auc_is_the_share_of_pairs_in_order() -> None:
    higher, lower = [0.5, 0.2, 0.9], [0.5, 0.1]
    by_hand = sum((a > b) + 0.5 * (a == b) for a in higher for b in lower) / 6
    assert auc(higher, lower) == pytest.approx(by_hand)
