"""Scores of other captions against towers run by hand; exchanged attributes and reversed relations word by word."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from stages.caption_scores import CaptionProbe, CaptionScores, with_attributes_exchanged, with_relation_reversed
from stages.contract import Batch, Context
from tests.stages.test_clip_score import CONFIG


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "tiny").mkdir()
    (folder / "tiny" / "open_clip_config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder / 'tiny'}", load_weights=False)
    save_file(model.state_dict(), folder / "tiny" / "open_clip_model.safetensors")
    return folder


def cosines(models: Path, embedding: np.ndarray, texts: list[str]) -> list[float]:
    """open_clip's own text tower, one text at a time."""
    model = open_clip.create_model(f"local-dir:{models / 'tiny'}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{models / 'tiny'}")
    image = torch.nn.functional.normalize(torch.from_numpy(embedding.astype(np.float32)), dim=-1)
    with torch.no_grad():
        texts_BD = [torch.nn.functional.normalize(model.encode_text(tokenizer([text]))[0], dim=-1) for text in texts]
    return [float(image @ text_D) for text_D in texts_BD]


def embeddings(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).normal(size=(count, 24)).astype(np.float16))


def test_every_alternative_is_scored_in_its_place(models: Path) -> None:
    images = embeddings(4)
    others = [["a red square", "two dogs"], [], None, [f"picture {n}" for n in range(20)]]
    stage = CaptionScores(model="tiny", compute_batch=16)
    batch = Batch({"clip.image_embedding": [*images[:3], images[3]], "alternatives": others})
    answer = stage.open(Context(models=(str(models),)))(batch)
    assert [len(scores) for scores in answer.values["scores"]] == [2, 0, 0, 20]
    for row in (0, 3):
        expected = cosines(models, images[row], others[row])
        assert answer.values["scores"][row] == pytest.approx(expected, abs=1e-5)
    assert answer.values["text_tokens"][0] == [5, 4]  # start, words, end
    assert not any(answer.errors)


def test_a_row_without_an_embedding_says_so_and_takes_no_other_with_it(models: Path) -> None:
    batch = Batch({"clip.image_embedding": [None, embeddings(1)[0]], "alternatives": [["a"], ["b"]]})
    answer = CaptionScores(model="tiny").open(Context(models=(str(models),)))(batch)
    assert answer.errors == ["no clip.image_embedding", None]
    assert answer.values["scores"][0] is None
    assert len(answer.values["scores"][1]) == 1


def test_another_models_embedding_is_refused(models: Path) -> None:
    batch = Batch({"clip.image_embedding": [np.ones(7, np.float16)], "alternatives": [["a"]]})
    with pytest.raises(ValueError, match="has 7 numbers, tiny makes 24; name the model that made it"):
        CaptionScores(model="tiny").open(Context(models=(str(models),)))(batch)


def test_a_probe_scores_the_caption_and_three_wrong_ones(models: Path) -> None:
    images = embeddings(3)
    captions = ["a red ball left of a blue box", "a dog", None]
    batch = Batch({"clip.image_embedding": images, "caption": captions, "uid": ["a", "b", "c"]})
    answer = CaptionProbe(model="tiny", compute_batch=16).open(Context(models=(str(models),)))(batch)
    first = [answer.values[name][0] for name in ("caption", "swapped", "attributes", "relation")]
    texts = [captions[0], "a dog", "a blue ball left of a red box", "a red ball right of a blue box"]
    assert first == pytest.approx(cosines(models, images[0], texts), abs=1e-5)
    assert answer.values["attributes"][1:] == [None, None]
    assert answer.values["swapped"][1] == pytest.approx(cosines(models, images[1], [captions[0]])[0], abs=1e-5)
    assert answer.values["caption"][2] is None


def test_a_share_of_rows_is_probed_whatever_their_batch() -> None:
    probe = CaptionProbe(model="tiny", fraction=0.25)
    chosen = {f"{n:08x}" for n in range(2000) if probe._probed(f"{n:08x}")}
    assert 400 < len(chosen) < 600
    with pytest.raises(ValueError, match="fraction 0"):
        CaptionProbe(model="tiny", fraction=0)


@pytest.mark.parametrize(
    ("caption", "exchanged"),
    [
        ("A red ball on a blue box", "A blue ball on a red box"),
        ("two small dogs, a large cat and a small bird", "two large dogs, a small cat and a small bird"),
        ("a red, red rose", None),
        ("a red rose in a small vase", None),
        ("a reddish cup and a blue plate", None),
        ("a wooden chair, a red cup and a metal table", "a metal chair, a red cup and a wooden table"),
    ],
)
def test_two_attributes_of_one_kind_change_places(caption: str, exchanged: str | None) -> None:
    assert with_attributes_exchanged(caption) == exchanged


@pytest.mark.parametrize(
    ("caption", "reversed_"),
    [
        ("a cat to the left of a dog", "a cat to the right of a dog"),
        ("A cup on top of a book", "A cup underneath a book"),
        ("a bird above a tree behind a house", "a bird below a tree behind a house"),
        ("clover fields overlooking the sea", None),
        ("he left home", None),
    ],
)
def test_the_first_relation_is_turned_round(caption: str, reversed_: str | None) -> None:
    assert with_relation_reversed(caption) == reversed_
