"""Preference scores and CLIP score against transformers' and torchmetrics' own, on a small CLIP with random weights."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.runner import SHIPPED_MODELS
from stages.clip_score import ClipScore
from stages.contract import Batch, Context
from stages.decode import EncodedImage
from training.evaluation.metrics import clip_scores
from training.evaluation.preference import Preference

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel as PickScore's is, two layers deep."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "red", "blue", "circle", "square"]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    layers = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**layers, "vocab_size": 9, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**layers, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    folder = tmp_path_factory.mktemp("openai-clip")  # torchmetrics knows CLIPs by such names
    CLIPModel(config).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=8,
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=fast).save_pretrained(folder)
    return folder


def _batch() -> Batch:
    rng = np.random.default_rng(0)
    images = []
    for _ in PROMPTS:
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(stream, "PNG")
        images.append(EncodedImage(stream.getvalue()))
    return Batch({"caption": [*PROMPTS, "a circle"]}, [*images, EncodedImage(b"junk")])


def test_pickscore_is_scaled_cosine_and_hpsv2_a_hundred(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPModel

    batch = _batch()
    hps = Preference(judge="hpsv2", model=str(clip_folder)).open(Context())(batch)
    pick = Preference(judge="pickscore", model=str(clip_folder)).open(Context())(batch)
    scale = float(CLIPModel.from_pretrained(clip_folder).logit_scale.exp())
    # transformers 5 wraps the projected features; torchmetrics expects them bare.
    for name in ("get_image_features", "get_text_features"):
        bare = getattr(CLIPModel, name)
        monkeypatch.setattr(CLIPModel, name, lambda *a, _bare=bare, **k: _bare(*a, **k).pooler_output)
    theirs = CLIPScore(model_name_or_path=str(clip_folder))
    for row, prompt in enumerate(PROMPTS):
        pixels = torch.from_numpy(np.array(batch.image(row))).permute(2, 0, 1)
        score = float(theirs(pixels, prompt))
        assert max(hps.values["score"][row], 0) == pytest.approx(score, abs=1e-4)
    ratio = np.array(pick.values["score"][:2]) / np.array(hps.values["score"][:2])
    np.testing.assert_allclose(ratio, scale / 100, rtol=1e-5)
    assert pick.values["score"][2] is None
    assert "not an image" in pick.errors[2]


def test_an_open_clip_tower_scores_as_our_clip_stage(tmp_path: Path) -> None:
    context, batch = Context(models=(str(SHIPPED_MODELS),)), _batch()
    cosines = ClipScore(model="clip", compute_batch=16).open(context)(batch).values["score"]
    found = Preference(judge="hpsv2", model="clip").open(context)(batch).values["score"]
    assert found[:2] == pytest.approx([100 * value for value in cosines[:2]], abs=1e-4)
    # The same tower from a bare file of weights, as HPSv2 is published.
    from safetensors.torch import load_file

    state = load_file(Path(SHIPPED_MODELS) / "clip/open_clip_model.safetensors")
    torch.save({"state_dict": state}, tmp_path / "hps.pt")
    tower = f"local-dir:{Path(SHIPPED_MODELS) / 'clip'}"
    again = Preference(judge="hpsv2", model=str(tmp_path / "hps.pt"), tower=tower).open(context)(batch)
    assert again.values["score"][:2] == pytest.approx(found[:2], abs=1e-5)


def test_image_reward_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pip install image-reward"):
        Preference(judge="image_reward", model=str(tmp_path)).open(Context())


def test_clip_scores_are_a_hundred_cosines() -> None:
    found = clip_scores(np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[4.0, 3.0], [-2.0, 0.0]]))
    assert found.tolist() == pytest.approx([96, -100])
    with pytest.raises(ValueError, match="do not pair"):
        clip_scores(np.ones((2, 3)), np.ones((3, 3)))
