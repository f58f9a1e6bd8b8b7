"""A snapshot and a text encoder written by hand, for tests that train: what curation makes, in miniature."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (230, 210, 40)}


def write_snapshot(
    folder: Path, *, shards: int = 2, rows: int = 24, held_out_every: int = 6, size: int = 40, seed: int = 0
) -> Path:
    """A snapshot folder with `shards` tars of `rows` kept rows each, every n-th held out, and as many rejected rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    (folder / "ledger").mkdir(parents=True)
    (folder / "shards").mkdir()
    entries, files = [], {}
    for shard in range(shards):
        table: list[dict[str, Any]] = []
        held = 0
        with tarfile.open(folder / f"shards/{shard:06d}.tar", "w") as tar:
            for place in range(rows):
                colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
                across = bool(rng.integers(2))
                caption = f"a {'wide' if across else 'tall'} {colour} bar"
                image = _picture(rng, size, COLOURS[colour], across)
                digest = hashlib.sha256(image).hexdigest()
                uid = hashlib.sha256(f"{digest}{caption}".encode()).hexdigest()[:32]
                split = "held_out" if place % held_out_every == held_out_every - 1 else "train"
                held += split == "held_out"
                key = f"{shard:06d}{place:06d}"
                facts = {"uid": uid, "image_id": digest[:32], "key": key, "caption": caption, "split": split}
                for extension, content in (
                    ("png", image),
                    ("txt", caption.encode()),
                    ("json", json.dumps(facts).encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                table.append(
                    {
                        "uid": uid,
                        "image_id": digest[:32],
                        "verdict": "kept",
                        "split": split,
                        "output_shard": f"shards/{shard:06d}.tar",
                        "output_key": key,
                    }
                )
                table.append(
                    {
                        "uid": uid[::-1],
                        "image_id": digest[:32][::-1],
                        "verdict": "rejected",
                        "split": None,
                        "output_shard": None,
                        "output_key": None,
                    }
                )
        pq.write_table(pa.Table.from_pylist(table), folder / f"ledger/{shard:06d}.parquet")
        entries.append({"path": f"shards/{shard:06d}.tar", "count": rows, "held_out": held, "digest": "0" * 32})
        files[f"ledger/{shard:06d}.parquet"] = {"digest": "0" * 32, "rows": len(table)}
    manifest = {
        "schema_version": "1.0",
        "kind": "snapshot",
        "id": hashlib.sha256(f"{shards}/{rows}/{size}/{seed}".encode()).hexdigest()[:32],
        "shards": entries,
        "files": files,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _picture(rng: np.random.Generator, size: int, colour: tuple[int, int, int], across: bool) -> bytes:
    from PIL import Image

    pixels = np.full((size, size + 8, 3), 235, np.uint8) - rng.integers(0, 8, (size, size + 8, 3), dtype=np.uint8)
    start = int(rng.integers(4, size // 2))
    pixels[(slice(start, start + 8), slice(None)) if across else (slice(None), slice(start, start + 8))] = colour
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_text_encoder(folder: Path) -> Path:
    """A one-layer Gemma 2 with random weights and a tokenizer of whole words, in transformers' format."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "wide", "tall", "bar", *COLOURS]
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Gemma2Model(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def recipe(**changes: Any) -> dict[str, Any]:
    """A recipe that trains a two-layer model on such a snapshot in a moment."""
    return {
        "name": "small",
        "model": {"size": "tiny", "num_layers": 2, "num_attention_heads": 2, "num_cross_attention_heads": 2},
        "resolution": 16,
        "autoencoder": {"type": "pixel_shuffle", "factor": 4},
        "text_encoder": {"folder": "text_encoder", "max_tokens": 8},
        "objective": {"type": "flow_matching"},
        "optimizer": {"lr": 1e-3, "warmup_steps": 5},
        "batch": {"global_batch": 8, "micro_batch": 4},
        "steps": 20,
        "precision": "fp32",
        "ema_decay": 0.99,
        "checkpoint_every": 10,
        "validate_every": 10,
        "log_every": 1,
        **changes,
    }
