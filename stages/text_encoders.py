"""Text encoders: captions to features for cross-attention, behind one interface.

    encoder = open_text_encoder({"folder": "text_encoder", "max_tokens": 300})
    features_BLC, mask_BL = encoder.encode(["a red circle", ""])       # "" is the null text of guidance

The encoder is a decoder-only language model in transformers' format (Gemma 2 for SANA, a two-layer one for the made-up
world): its last hidden state, padded on the right to max_tokens, always that length. Captions are lower-cased and
stripped first, as SANA's pipeline does.

`human_instruction=True` is SANA's complex human instruction: a fixed text set before every caption, whose tokens are
cut away again (features keep position 0 and the last max_tokens − 1 of n_instruction + max_tokens − 2 positions). The
text is taken from the installed diffusers' SanaPipeline when it is needed. The null text never gets it.

torch and transformers are imported where they are used.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stages.contract import digest_of, file_digest, weights_digest

if TYPE_CHECKING:
    from torch import Tensor


class TextEncoder(Protocol):
    """max_tokens: L. channels: C of a feature. digest: 32 hex digits over everything that decides the numbers."""

    max_tokens: int
    channels: int
    digest: str

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(features (B, L, C) float32, mask (B, L) int64: 1 for tokens, 0 for padding) on the CPU."""


class DecoderTextEncoder:
    """A language model's last hidden state, from a local folder with config.json, weights and tokenizer files.

    The tokenizer may also lie in `tokenizer/` beside or inside the folder (diffusers' pipeline layout).
    batch: how many texts go through the model at once; it changes memory, not numbers beyond the last bits.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        max_tokens: int = 300,
        human_instruction: bool = False,
        device: str = "cpu",
        dtype: str = "float32",
        batch: int = 64,
    ) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.folder = _model_folder(Path(folder))
        if not (self.folder / "config.json").exists():
            raise ValueError(
                f"text encoder: {self.folder} has no config.json: name the folder of a model that transformers saved"
            )
        if max_tokens < 2:
            raise ValueError(f"text encoder: max_tokens is {max_tokens}: at least 2 are needed (the first is <bos>)")
        places, tokenizer_folder = _tokenizer_folder(self.folder)
        if tokenizer_folder is None:
            raise ValueError(
                f"text encoder: no tokenizer_config.json in {', '.join(map(str, places))}: "
                "save the tokenizer beside the model"
            )
        self.max_tokens, self.device, self.dtype_name, self.batch = max_tokens, device, dtype, batch
        self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        self.tokenizer.padding_side = "right"
        model: Any = AutoModel.from_pretrained(self.folder, local_files_only=True, dtype=getattr(torch, dtype))
        # An encoder-decoder's or a multimodal model's text part is not looked for: this is for decoders.
        self.model = model.to(device).eval().requires_grad_(False)
        self.channels = int(model.config.hidden_size)
        self.human_instruction = human_instruction
        self.instruction = "\n".join(sana_human_instruction()) if human_instruction else ""
        self.instruction_tokens = len(self.tokenizer.encode(self.instruction)) if human_instruction else 0
        files = (path for place in {self.folder, tokenizer_folder} for path in _read_files(place))
        self.weights_digest = weights_digest((path.name, file_digest(path)) for path in files)
        self.digest = digest_of("text_encoder", self.weights_digest, max_tokens, dtype, self.instruction)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        import torch

        features, masks = [], []
        instructed = [bool(self.instruction and text) for text in texts]
        if any(instructed) and not all(instructed):  # the null text has no instruction, hence another length
            parts = [self.encode([text]) for text in texts]
            return torch.cat([f for f, _ in parts]), torch.cat([m for _, m in parts])
        for start in range(0, len(texts), self.batch):
            part = [text.lower().strip() for text in texts[start : start + self.batch]]
            length = self.max_tokens
            if instructed[start]:
                part = [self.instruction + text for text in part]
                length += self.instruction_tokens - 2
            tokens = self.tokenizer(
                part, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).to(self.device)
            with torch.no_grad():
                hidden = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
            kept = [0, *range(length - self.max_tokens + 1, length)]
            features.append(hidden[:, kept].float().cpu())
            masks.append(tokens.attention_mask[:, kept].cpu())
        if not features:
            return torch.zeros(0, self.max_tokens, self.channels), torch.zeros(0, self.max_tokens, dtype=torch.long)
        return torch.cat(features), torch.cat(masks)

    def null(self) -> tuple[Tensor, Tensor]:
        """(features (L, C), mask (L,)) of the empty prompt."""
        features, mask = self.encode([""])
        return features[0], mask[0]

    def describe(self) -> dict[str, Any]:
        """Plain JSON that `open_text_encoder` opens again: the folder by its name, not its path; with the digest."""
        return {
            "folder": self.folder.name,
            "max_tokens": self.max_tokens,
            "human_instruction": self.human_instruction,
            "dtype": self.dtype_name,
            "digest": self.digest,
        }


def model_files(folder: Path) -> dict[str, Path]:
    """The files of a text encoder's folder, and of its tokenizer's, that decide its numbers, by name."""
    model = _model_folder(folder)
    tokenizer = _tokenizer_folder(model)[1]
    places = [model] if tokenizer is None or tokenizer == model else [model, tokenizer]
    return {path.name: path for place in places for path in _read_files(place)}


def _model_folder(folder: Path) -> Path:
    """The folder itself, or its text_encoder/ in a pipeline's layout."""
    inner = folder / "text_encoder"
    return inner if not (folder / "config.json").exists() and (inner / "config.json").exists() else folder


def _tokenizer_folder(model: Path) -> tuple[tuple[Path, ...], Path | None]:
    """(places looked at, the first with a tokenizer)."""
    places = (model, model / "tokenizer", model.parent / "tokenizer")
    return places, next((place for place in places if (place / "tokenizer_config.json").exists()), None)


def _read_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".model")]


def sana_human_instruction() -> list[str]:
    """The lines of SANA's complex human instruction, as the installed diffusers' SanaPipeline has them by default."""
    from diffusers import SanaPipeline

    return list(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


def open_text_encoder(
    options: Mapping[str, Any], *, models: tuple[str, ...] = (), device: str = "cpu"
) -> DecoderTextEncoder:
    """The text encoder that a recipe describes: {"folder": ..., "max_tokens": 300, "human_instruction": false}.

    A relative folder is looked for in `models`. A "digest" among the options is checked against what was opened.
    """
    from stages.contract import Context

    given = dict(options)
    expected = given.pop("digest", None)
    known = ("folder", "max_tokens", "human_instruction", "dtype", "batch")
    for name in given:
        if name not in known:
            raise ValueError(f"text_encoder.{name} is not an option: it knows {', '.join(known)}")
    if "folder" not in given:
        raise ValueError("text_encoder.folder is missing: name the folder of the language model")
    opened = DecoderTextEncoder(Context(models=models).find(given.pop("folder")), device=device, **given)
    if expected is not None and opened.digest != expected:
        raise ValueError(
            f"text encoder {opened.folder}: its digest is {opened.digest}, expected {expected}: "
            "the model was trained on features of another text encoder; point to that one"
        )
    return opened
