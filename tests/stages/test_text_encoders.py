"""Text encoders: a two-layer Gemma 2 made on the fly stands for the real one, and SanaPipeline is the reference."""

from __future__ import annotations

import pytest
import torch
from diffusers import SanaPipeline

from stages.text_encoders import open_text_encoder, sana_human_instruction

TEXTS = ["a Red circle ", "two blue squares above a small green triangle", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

    words = " ".join([*TEXTS, *sana_human_instruction()]).lower()
    splitter = pre_tokenizers.Whitespace()
    kept = sorted({word for word, _ in splitter.pre_tokenize_str(words)})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *kept])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    model = Gemma2Model(
        Gemma2Config(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=512,
        )
    ).eval()
    root = tmp_path_factory.mktemp("models") / "gemma"
    model.save_pretrained(root)
    fast.save_pretrained(root)
    return root


def pipeline(folder) -> SanaPipeline:
    from transformers import AutoModel, AutoTokenizer

    empty = {"vae": None, "transformer": None, "scheduler": None}
    return SanaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder), text_encoder=AutoModel.from_pretrained(folder).eval(), **empty
    )


@pytest.mark.parametrize("human_instruction", [False, True])
def test_features_are_sana_pipelines(folder, human_instruction):
    encoder = open_text_encoder({"folder": str(folder), "max_tokens": 12, "human_instruction": human_instruction})
    features, mask = encoder.encode(TEXTS)
    with torch.no_grad():
        expected, expected_mask, negative, negative_mask = pipeline(folder).encode_prompt(
            TEXTS,
            device=torch.device("cpu"),
            max_sequence_length=12,
            complex_human_instruction=sana_human_instruction() if human_instruction else None,
        )
    assert features.shape == (3, 12, 32)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(mask, expected_mask)
    null, null_mask = encoder.null()
    torch.testing.assert_close(null, negative[0], atol=1e-5, rtol=1e-4)
    assert torch.equal(null_mask, negative_mask[0])
    if not human_instruction:
        assert mask.sum(1).tolist() == [4, 9, 2]


def test_null_text_has_no_instruction_and_may_stand_among_others(folder):
    encoder = open_text_encoder({"folder": str(folder), "max_tokens": 12, "human_instruction": True})
    features, mask = encoder.encode(["a", "", "a"])
    torch.testing.assert_close(features[1], encoder.null()[0])
    torch.testing.assert_close(features[0], encoder.encode(["a"])[0][0])
    assert mask.shape == (3, 12)


def test_batches_and_case_change_nothing(folder):
    encoder = open_text_encoder({"folder": str(folder), "max_tokens": 12, "batch": 2})
    features, mask = encoder.encode(TEXTS)
    for i, text in enumerate(TEXTS):
        alone, alone_mask = encoder.encode([text.upper()])
        torch.testing.assert_close(features[i : i + 1], alone, atol=1e-5, rtol=1e-4)
        assert torch.equal(mask[i : i + 1], alone_mask)
    assert encoder.encode([])[0].shape == (0, 12, 32)


def test_long_captions_are_cut(folder):
    encoder = open_text_encoder({"folder": str(folder), "max_tokens": 4})
    features, mask = encoder.encode([TEXTS[1]])
    assert features.shape == (1, 4, 32)
    assert mask.sum() == 4


def test_identity(folder):
    models = (str(folder.parent),)
    plain = open_text_encoder({"folder": "gemma", "max_tokens": 12}, models=models)
    assert plain.channels == 32
    assert len(plain.digest) == 32
    assert open_text_encoder(plain.describe(), models=models).digest == plain.digest
    other = {
        open_text_encoder({"folder": "gemma"} | changes, models=models).digest
        for changes in (
            {"max_tokens": 12, "human_instruction": True},
            {"max_tokens": 13},
            {"max_tokens": 12, "batch": 1},
        )
    }
    assert plain.digest in other  # the batch is no part of it
    assert len(other) == 3
    with pytest.raises(ValueError, match="another text encoder"):
        open_text_encoder({**plain.describe(), "digest": "0" * 32}, models=models)


def test_diffusers_folder_layout(folder, tmp_path):
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "tokenizer").mkdir()
    for path in folder.iterdir():
        place = "tokenizer" if path.name.startswith("token") else "text_encoder"
        (tmp_path / place / path.name).write_bytes(path.read_bytes())
    found = open_text_encoder({"folder": str(tmp_path), "max_tokens": 12})
    expected = open_text_encoder({"folder": str(folder), "max_tokens": 12})
    assert torch.equal(found.encode(TEXTS)[0], expected.encode(TEXTS)[0])


def test_mistakes_are_answered(folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        open_text_encoder({"folder": str(tmp_path)})
    with pytest.raises(ValueError, match=r"text_encoder\.folder is missing"):
        open_text_encoder({})
    with pytest.raises(ValueError, match=r"text_encoder\.max_token is not an option"):
        open_text_encoder({"folder": str(folder), "max_token": 3})
    with pytest.raises(ValueError, match="at least 2"):
        open_text_encoder({"folder": str(folder), "max_tokens": 1})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="save the tokenizer beside the model"):
        open_text_encoder({"folder": str(tmp_path)})
