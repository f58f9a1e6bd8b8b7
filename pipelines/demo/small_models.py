"""Trains the small models of the made-up world: a CLIP, an aesthetic head and a text encoder, a few MB in all.

    python -m pipelines.demo.small_models                     # writes pipelines/demo/weights/, slowly (accuracy.json)
    python -m pipelines.demo.small_models --measure           # measures what lies there, trains nothing

Each is saved in the format of the model that it stands for, so that the code which loads the real one loads it:

    clip/          open_clip's local folder (open_clip_config.json, weights and a tokenizer), for ViT-L-14
    aesthetic/     model.safetensors with the keys of LAION's improved aesthetic predictor (layers.0.weight ...)
    text_encoder/  a Gemma2Model in transformers' format with its tokenizer, for Gemma-2-2B-it
    accuracy.json  what was measured on pictures that no training saw, and how to measure it again

The models see scenes of TRAINING_SEED only; figures are measured on HELD_OUT_SEED, and worlds for demos and tests take
seeds of their own. The pictures are the JPEGs that `make_world` writes, through open_clip's own preprocessing.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.demo.world import (
    COLOURS,
    SHAPES,
    Scene,
    caption,
    draw,
    encode,
    picture_size,
    plain_caption,
    sample_scene,
    spoil,
)

if TYPE_CHECKING:
    import torch

WEIGHTS = Path(__file__).parent / "weights"
TRAINING_SEED = 1_000_003
HELD_OUT_SEED = 2_000_003

IMAGE_SIDE = 48
CONTEXT_LENGTH = 20
PAD, EOS, BOS, UNKNOWN = "<pad>", "<eos>", "<bos>", "<unk>"  # ids 0, 1, 2, 3, as in Gemma
CLIP_CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 96,
        "vision_cfg": {"image_size": IMAGE_SIDE, "patch_size": 8, "width": 96, "head_width": 32, "layers": 4},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": 0,  # filled in from the tokenizer
            "hf_tokenizer_name": "word-level",  # any name: open_clip takes the tokenizer from the folder itself
            "width": 96,
            "heads": 3,
            "layers": 2,
            "pool_type": "eos",
            "eos_id": 1,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"},
}
CLIP_STEPS = 1000
CLEAN_SCORE, UGLY_SCORE = 7.0, 2.5  # what the aesthetic head learns to give, on LAION's scale of about 1..10


# --- data ------------------------------------------------------------------------------------------------------------


def pictures(count: int, seed: int, ugly_share: float = 0.0) -> tuple[list[Scene], np.ndarray, np.ndarray]:
    """Scenes, their pictures (count, side, side, 3) uint8 as CLIP's preprocessing sees them, and spoiling 0..1 of each.

    A spoiled picture is a blend of the clean one and an ugly one, so that there are grades of ugliness; half of the
    spoiled ones are spoiled wholly.
    """
    from PIL import Image
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    fit = Compose([Resize(IMAGE_SIDE, InterpolationMode.BICUBIC), CenterCrop(IMAGE_SIDE)])
    rng = np.random.default_rng([seed, 17])
    scenes, spoiling = [], np.zeros(count, np.float32)
    pixels = np.zeros((count, IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)
    for i in range(count):
        scene = sample_scene(rng)
        picture = draw(scene, picture_size(rng), rng)
        if rng.random() < ugly_share:
            spoiling[i] = 1.0 if rng.random() < 0.5 else rng.uniform(0, 1)
            picture = Image.blend(picture, spoil(picture, rng), float(spoiling[i]))
        data = encode(picture, "jpg", quality=int(rng.integers(80, 96)))
        pixels[i] = np.asarray(fit(Image.open(io.BytesIO(data)).convert("RGB")))
        scenes.append(scene)
    return scenes, pixels, spoiling


def false_captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Two captions that are nearly true: colours exchanged and relation reversed where there are two things, else (and
    now and then) one colour or shape changed."""
    if scene.relation is not None and rng.random() < 0.8:
        return [caption(false, rng) for false in (scene.with_colours_exchanged(), scene.with_relation_reversed())]
    return [caption(_changed(scene, what, rng), rng) for what in ("colour", "shape")]


def _changed(scene: Scene, what: str, rng: np.random.Generator) -> Scene:
    which = int(rng.integers(len(scene.things)))
    things = list(scene.things)
    if what == "colour":
        used = {thing.colour for thing in things}
        colours = [colour for colour in COLOURS if colour not in used]
        things[which] = replace(things[which], colour=colours[rng.integers(len(colours))])
    else:
        shapes = [shape for shape in SHAPES if shape != things[which].shape]
        things[which] = replace(things[which], shape=shapes[rng.integers(len(shapes))])
    return Scene(tuple(things), scene.relation)


def meaning(scene: Scene) -> str:
    """The same for scenes that a caption without sizes cannot tell apart."""
    things = tuple(replace(thing, size="large") for thing in scene.things)
    if scene.relation in ("below", "right of"):
        things = things[::-1]
    relation = {"below": "above", "right of": "left of"}.get(scene.relation or "", scene.relation)
    return plain_caption(Scene(things, relation))


# --- tokenizer -------------------------------------------------------------------------------------------------------


def make_tokenizer() -> Any:
    """A word-level PreTrainedTokenizerFast over the captions' words, with Gemma's special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng([TRAINING_SEED, 3])
    splitter = pre_tokenizers.Whitespace()
    words = {
        word for _ in range(5000) for word, _ in splitter.pre_tokenize_str(caption(sample_scene(rng), rng).lower())
    }
    vocabulary = {word: i for i, word in enumerate([PAD, EOS, BOS, UNKNOWN, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, vocabulary[BOS]), (EOS, vocabulary[EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="right",
        model_max_length=300,
    )


# --- CLIP ------------------------------------------------------------------------------------------------------------


def train_clip(
    folder: Path, steps: int = CLIP_STEPS, batch: int = 64, samples: int = 6000, onward: bool = False
) -> None:
    """Contrastive training (Radford et al. 2021) with hard negatives, after which the folder holds an open_clip model.

    Each picture is held against the captions of its batch and against two nearly true captions of its own, which is
    what teaches which colour belongs to which shape and who stands where. Captions that are true of a picture without
    being its own count neither way. A linear read-out of the spoiling keeps that visible in the embedding, for the
    aesthetic head; it is thrown away. onward: start from the model that lies in the folder, with other draws.
    """
    import open_clip
    import torch
    from safetensors.torch import save_file
    from torch.nn import functional

    torch.manual_seed(TRAINING_SEED)
    seed = TRAINING_SEED + 10 * onward
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = json.loads(json.dumps(CLIP_CONFIG))
    config["model_cfg"]["text_cfg"]["vocab_size"] = len(tokenizer)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")

    started = time.monotonic()
    scenes, pixels, spoiling = pictures(samples, seed, ugly_share=0.25)
    print(f"clip: {samples} pictures drawn in {time.monotonic() - started:.0f} s", flush=True)
    meanings = np.unique([meaning(scene) for scene in scenes], return_inverse=True)[1]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    spoiled = torch.from_numpy(spoiling)

    model = open_clip.create_model(f"local-dir:{folder}", load_weights=onward)
    quality = torch.nn.Linear(config["model_cfg"]["embed_dim"], 1)
    parameters = [*model.parameters(), *quality.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, 100, steps))
    rng = np.random.default_rng([seed, 5])
    model.train()
    for step in range(steps):
        rows = rng.choice(samples, batch, replace=False)
        own = [caption(scenes[i], rng) for i in rows]
        false = [text for i in rows for text in false_captions(scenes[i], rng)]
        tokens = _tokens(tokenizer, own + false)
        # bf16 towers: 3 times the speed on a CPU with matrix units, and no slower to learn at this size.
        with torch.autocast("cpu", torch.bfloat16):
            image_features = model.encode_image(_augmented(images[rows], rng))
            text_features = model.encode_text(tokens)
        image_features = functional.normalize(image_features.float(), dim=-1)
        text_features = functional.normalize(text_features.float(), dim=-1)
        scale = model.logit_scale.exp()
        logits = scale * image_features @ text_features[:batch].T
        same = torch.from_numpy((meanings[rows][:, None] == meanings[rows][None]) & ~np.eye(batch, dtype=bool))
        logits = logits.masked_fill(same, -torch.inf)
        near_misses = text_features[batch:].view(batch, 2, -1)
        near_logits = scale * torch.einsum("bd,bkd->bk", image_features, near_misses)
        target = torch.arange(batch)
        loss = functional.cross_entropy(torch.cat([logits, near_logits], dim=1), target)
        loss = loss + functional.cross_entropy(logits.T, target)
        # The same hard negatives once more by themselves: among so many others they would weigh too little.
        near = torch.cat([logits.diagonal()[:, None], near_logits], dim=1)
        loss = loss + 2 * functional.cross_entropy(near, target * 0)
        # Unit vectors have small coordinates: without the factor the read-out learns too slowly to be worth hearing.
        read = quality(image_features * math.sqrt(image_features.shape[1]))[:, 0]
        loss = loss + 2 * functional.mse_loss(read, spoiled[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(50))
        if step % 100 == 0 or step == steps - 1:
            _tell("clip", step, steps, loss, started)
    state = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


def _tell(model: str, step: int, steps: int, loss: torch.Tensor, started: float) -> None:
    print(f"{model}: step {step}/{steps} loss {loss.item():.3f} {time.monotonic() - started:.0f} s", flush=True)


def _warm_cosine(step: int, warm: int, steps: int) -> float:
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def _tokens(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    lengths = {"padding": "max_length", "truncation": True, "max_length": CONTEXT_LENGTH}
    return tokenizer(list(texts), return_tensors="pt", **lengths).input_ids


def _augmented(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Normalised pictures (B, 3, side, side), shifted by up to 4 pixels and slightly brightened, for training only."""
    import torch
    from torch.nn import functional

    x = (images.float() / 255 - 0.5) / 0.5
    dy, dx = (int(v) for v in rng.integers(0, 9, size=2))
    side = x.shape[-1]
    x = functional.pad(x, (4, 4, 4, 4), mode="replicate")[..., dy : dy + side, dx : dx + side]
    gain = torch.from_numpy(rng.uniform(0.92, 1.08, size=(len(x), 1, 1, 1)).astype(np.float32))
    return ((x + 1) * gain - 1).clamp(-1, 1)


# --- aesthetic head --------------------------------------------------------------------------------------------------


def train_aesthetic(folder: Path, clip: Path, steps: int = 600, samples: int = 2000) -> None:
    """Regression of a score on clip's image embeddings: CLEAN_SCORE for a clean drawing, UGLY_SCORE for a spoiled one.

    The layers, their names and the dropout between them are those of LAION's improved predictor; so is the lack of
    activations.
    """
    import open_clip
    import torch
    from safetensors.torch import save_file
    from torch.nn import Dropout, Linear, functional

    torch.manual_seed(TRAINING_SEED)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    _, pixels, spoiling = pictures(samples, TRAINING_SEED + 1, ugly_share=0.5)
    model = open_clip.create_model(f"local-dir:{clip}").eval()
    with torch.inference_mode():
        images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        embeddings = torch.cat([model.encode_image(part, normalize=True) for part in images.split(250)]).clone()
    target = torch.from_numpy(CLEAN_SCORE + (UGLY_SCORE - CLEAN_SCORE) * spoiling)
    layers = torch.nn.Sequential(
        Linear(embeddings.shape[1], 1024),
        Dropout(0.2),
        Linear(1024, 128),
        Dropout(0.2),
        Linear(128, 64),
        Dropout(0.1),
        Linear(64, 16),
        Linear(16, 1),
    )
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, 20, steps))
    for step in range(steps):
        rows = torch.randint(samples, (256,))
        loss = functional.mse_loss(layers(embeddings[rows])[:, 0], target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            _tell("aesthetic", step, steps, loss, started)
    state = {f"layers.{name}": value.detach().half().contiguous() for name, value in layers.state_dict().items()}
    save_file(state, folder / "model.safetensors")


# --- text encoder ----------------------------------------------------------------------------------------------------


RECALLED = 6  # words back that the text encoder's features must still hold


def train_text_encoder(folder: Path, steps: int = 400, batch: int = 64) -> None:
    """A Gemma 2 small enough for a laptop, trained to continue captions and to remember the words before.

    Continuing alone is not enough in this world: after "a large red" as after "a large blue" the same words may follow,
    so a language model forgets the colour (cosine 0.998 between the two features), and a model that is conditioned on
    them draws any colour. Linear read-outs of the word at hand and of the RECALLED ones before it keep them in.
    """
    import torch
    from torch.nn import functional
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(TRAINING_SEED)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=512,
        sliding_window=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        tie_word_embeddings=True,
    )
    model = Gemma2Model(config)
    # Read-outs of the next word (back -1), of this one (0) and of those before it.
    heads = {back: torch.nn.Linear(config.hidden_size, len(tokenizer)) for back in range(-1, RECALLED + 1)}
    parameters = [*model.parameters(), *(p for head in heads.values() for p in head.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, 30, steps))
    rng = np.random.default_rng([TRAINING_SEED, 11])
    started = time.monotonic()
    model.train()
    for step in range(steps):
        encoded = tokenizer(_captions(batch, rng), padding=True, return_tensors="pt")
        words_BL = encoded.input_ids.masked_fill(encoded.attention_mask == 0, -100)
        hidden_BLC = model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).last_hidden_state
        loss = torch.zeros(())
        for back, head in heads.items():
            at = hidden_BLC[:, max(back, 0) : hidden_BLC.shape[1] + min(back, 0)]
            asked = words_BL.roll(back, dims=1)[:, max(back, 0) : words_BL.shape[1] + min(back, 0)]
            if back > 0:  # padding remembers nothing
                asked = asked.masked_fill(words_BL[:, back:] == -100, -100)
            loss = loss + functional.cross_entropy(head(at).flatten(0, 1), asked.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            _tell("text encoder", step, steps, loss, started)
    model.save_pretrained(folder)


def _captions(count: int, rng: np.random.Generator) -> list[str]:
    return [caption(sample_scene(rng), rng) for _ in range(count)]


def other_colour_cosine(weights: Path, count: int, seed: int) -> float:
    """Mean cosine between the features of one word in captions that differ in an earlier or the same colour word.

    Near 1 the encoder has forgotten the colour, and nothing that is conditioned on it can draw what was asked.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights / "text_encoder")
    model = AutoModel.from_pretrained(weights / "text_encoder").eval()
    rng = np.random.default_rng([seed, 13])
    colours = list(COLOURS)
    cosines = []
    with torch.inference_mode():
        for _ in range(count):
            first, other = rng.permutation(colours)[:2]
            shape = SHAPES[rng.integers(len(SHAPES))]
            encoded = tokenizer([f"a large {colour} {shape}" for colour in (first, other)], return_tensors="pt")
            features = model(**encoded).last_hidden_state
            cosines.append(torch.cosine_similarity(features[0, 3:5], features[1, 3:5], dim=-1).mean())
    return float(torch.stack(cosines).mean())


# --- measuring -------------------------------------------------------------------------------------------------------


def auc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """Probability that a value of the first kind exceeds one of the second (ties count half)."""
    first, second = np.asarray(higher, np.float64), np.sort(np.asarray(lower, np.float64))
    below = np.searchsorted(second, first, side="left") + np.searchsorted(second, first, side="right")
    return float(below.mean() / 2 / len(second))


def measure(weights: Path = WEIGHTS, seed: int = HELD_OUT_SEED, count: int = 400) -> dict[str, Any]:
    """Figures of all three models on `count` freshly drawn scenes, through the stages that curation runs.

    clip: AUC of true captions above false ones, over all pictures and not within a pair, as a threshold sees them.
    aesthetic: AUC of clean above ugly, and the mean scores. text_encoder: see `other_colour_cosine`.
    """
    from stages.aesthetic import Aesthetic
    from stages.clip_score import ClipScore
    from stages.contract import Batch, Context
    from stages.decode import EncodedImage

    context = Context(models=(str(weights),))
    score = ClipScore(model="clip").open(context)
    judge = Aesthetic(head="aesthetic/model.safetensors").open(context)
    rng = np.random.default_rng([seed, 29])
    scenes = [sample_scene(rng) for _ in range(count)]
    drawn = [draw(scene, picture_size(rng), rng) for scene in scenes]
    files = [encode(picture, "jpg", quality=int(rng.integers(88, 96))) for picture in drawn]
    ugly = [encode(spoil(picture, rng), "jpg", quality=int(rng.integers(88, 96))) for picture in drawn]

    def scored(data: list[bytes], texts: list[str]) -> tuple[list[float], list[float]]:
        answer = score(Batch({"caption": texts}, [EncodedImage(item) for item in data]))
        assert not any(answer.errors or [])
        embeddings = {"clip.image_embedding": answer.values["image_embedding"]}
        return list(answer.values["score"]), list(judge(Batch(embeddings)).values["score"])

    true, clean_scores = scored(files, [caption(scene, rng) for scene in scenes])
    _, ugly_scores = scored(ugly, [plain_caption(scene) for scene in scenes])
    strangers = [_stranger(scenes, i) for i in range(count)]
    swapped, _ = scored(files, [caption(stranger, rng) for stranger in strangers])
    pairs = [i for i in range(count) if scenes[i].relation is not None]
    exchanged, _ = scored([files[i] for i in pairs], [caption(scenes[i].with_colours_exchanged(), rng) for i in pairs])
    reversed_, _ = scored([files[i] for i in pairs], [caption(scenes[i].with_relation_reversed(), rng) for i in pairs])

    return {
        "clip": {
            "auc_swapped_caption": round(auc(true, swapped), 4),
            "auc_swapped_attributes": round(auc([true[i] for i in pairs], exchanged), 4),
            "auc_swapped_relation": round(auc([true[i] for i in pairs], reversed_), 4),
            "mean_score_true": round(float(np.mean(true)), 4),
            "mean_score_swapped": round(float(np.mean(swapped)), 4),
        },
        "aesthetic": {
            "auc_clean_above_ugly": round(auc(clean_scores, ugly_scores), 4),
            "mean_score_clean": round(float(np.mean(clean_scores)), 3),
            "mean_score_ugly": round(float(np.mean(ugly_scores)), 3),
        },
        "text_encoder": {
            "other_colour_cosine": round(other_colour_cosine(weights, 64, seed), 4),
        },
    }


def _stranger(scenes: Sequence[Scene], i: int) -> Scene:
    """The next scene that shows other things than scene i."""
    own = {(thing.colour, thing.shape) for thing in scenes[i].things}
    others = (scenes[(i + step) % len(scenes)] for step in range(1, len(scenes)))
    return next(scene for scene in others if {(thing.colour, thing.shape) for thing in scene.things} != own)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="folder to write (default: beside this script)")
    parser.add_argument("--clip-steps", type=int, default=CLIP_STEPS, help="training steps of the CLIP")
    parser.add_argument("--onward", action="store_true", help="train the CLIP in the folder for as many steps more")
    parser.add_argument("--measure", action="store_true", help="only measure what lies in the folder, and print it")
    options = parser.parse_args(arguments)
    output: Path = options.output
    if options.measure:
        print(json.dumps(measure(output), indent=2))
        return
    record = output / "accuracy.json"
    before: dict[str, Any] = {"clip_steps": [], "training_seconds": {"clip": 0}}
    if options.onward:
        before = json.loads(record.read_text())
    seconds = dict(before["training_seconds"])
    started = time.monotonic()
    train_clip(output / "clip", steps=options.clip_steps, onward=options.onward)
    seconds["clip"] += round(time.monotonic() - started)
    started = time.monotonic()
    train_aesthetic(output / "aesthetic", output / "clip")
    seconds["aesthetic"] = round(time.monotonic() - started)
    if not options.onward:
        started = time.monotonic()
        train_text_encoder(output / "text_encoder")
        seconds["text_encoder"] = round(time.monotonic() - started)
    figures = measure(output)
    figures["measured_on"] = {"seed": HELD_OUT_SEED, "pictures": 400, "training_seed": TRAINING_SEED}
    figures["clip_steps"] = [*before["clip_steps"], options.clip_steps]
    figures["training_seconds"] = seconds
    figures["bytes"] = sum(file.stat().st_size for file in output.rglob("*.safetensors"))
    record.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    print(f"wrote {output}; next: python -m pytest tests/pipelines/demo")


if __name__ == "__main__":
    main()
