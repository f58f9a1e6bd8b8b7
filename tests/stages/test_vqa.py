"""The question-answering measure: real loading of a tiny model in transformers' format, and its number by hand."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stages.contract import Batch, Context
from stages.decode import EncodedImage
from stages.vqa import TransformersAnswerer, Vqa

WORDS = '<unk> <pad> <s> </s> <image> does this picture show a red blue ball answer yes no or . ? " Yes No'.split()  # noqa: SIM905


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA of a few thousand parameters, with its processor, saved as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    path = tmp_path_factory.mktemp("models") / "tiny-vlm"
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(path)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=WORDS.index("<image>"))
    LlavaForConditionalGeneration(config).save_pretrained(path)
    return path


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def encoded(image: Image.Image) -> EncodedImage:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return EncodedImage(stream.getvalue())


def test_the_score_is_the_share_of_yes_among_the_first_words(folder: Path) -> None:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    captions = ["a red ball", "a blue {ball}", None, "a ball"]
    images = [encoded(picture(0)), encoded(picture(1)), encoded(picture(2)), EncodedImage(b"broken")]
    stage = Vqa(model="tiny-vlm", precision="fp32")
    answer = stage.open(Context(models=(str(folder.parent),)))(Batch({"caption": captions}, images))
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    for row in (0, 1):
        text = f'<image>\nDoes this picture show "{captions[row]}"? Answer yes or no.\n'
        inputs = processor(images=picture(row), text=text, return_tensors="pt")
        with torch.no_grad():
            share = model(**inputs).logits[0, -1].softmax(-1)
        yes, no = (sum(float(share[WORDS.index(word)]) for word in words) for words in (("yes", "Yes"), ("no", "No")))
        assert answer.values["score"][row] == pytest.approx(yes / (yes + no), abs=1e-5)
    assert answer.values["score"][0] != answer.values["score"][1]
    assert answer.errors == [None, None, "no caption", "not an image of a known format"]


def test_a_chat_template_is_used_where_there_is_one(folder: Path) -> None:
    answerer = TransformersAnswerer(folder, "cpu", "fp32")
    assert answerer.prompt("what ?") == "<image>\nwhat ?\n"
    answerer.processor.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}"
        "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}[answer]"
    )
    assert answerer.prompt("what ?") == "[user]<image>what ?[answer]"


def test_another_answerer_takes_part_and_one_bad_row_costs_that_row() -> None:
    asked = []

    class Scripted:
        def yes_probability(self, image: Image.Image, question: str) -> float:
            asked.append((image.mode, question))
            if "trouble" in question:
                raise RuntimeError("out of words")
            return float("nan") if "odd" in question else 0.75

    measure = Vqa(model="none", question="Is it {caption}?").asking(Scripted())
    batch = Batch({"caption": ["a cat", "trouble", "odd"]}, [encoded(picture(n)) for n in range(3)])
    answer = measure(batch)
    assert answer.values["score"] == [0.75, None, None]
    assert answer.errors == [None, "vqa: RuntimeError: out of words", "score is not a finite number"]
    assert asked[0] == ("RGB", "Is it a cat?")


def test_a_folder_that_is_no_model_and_a_question_without_a_caption_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"needs config\.json"):
        Vqa(model="empty").weights(Context(models=(str(tmp_path),)))
    with pytest.raises(ValueError, match=r"no \{caption\}"):
        Vqa(model="x", question="Is it nice?")
