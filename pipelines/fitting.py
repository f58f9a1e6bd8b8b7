"""`sluice init`: look at what lies in a folder and write a recipe fitted to it, with what was seen as comments."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np

from pipelines.readers import InputShard, Sample, discover, read
from pipelines.recipe import Input
from stages.decode import EncodedImage
from stages.text_quality import flaw_of, words_of

LOOK_AT = 200  # samples looked at, spread over the shards


def fitted_recipe(url: str) -> tuple[str, str]:
    """(recipe as YAML, what was seen in words). Raises RecipeError where there is nothing to read."""
    shards = discover(Input(url))
    samples = _some_samples(shards)
    sides, failures = [], Counter[str]()
    for sample in samples:
        image = EncodedImage(sample.data, sample.error)
        picture = image.picture()
        if picture is None:
            failures[image.error or ""] += 1
        else:
            sides.append(min(picture.size))
    captions = [sample.caption for sample in samples if sample.caption]
    short = _round_down(float(np.percentile(sides, 5))) if sides else 64
    summary = [
        f"{len(shards):,} {shards[0].format} shards, {sum(shard.size_bytes for shard in shards) / 1e6:,.1f} MB; "
        f"looked at {len(samples)} samples",
        f"images    {len(sides)} open" + (f", short side {min(sides)} to {max(sides)} px" if sides else ""),
        f"captions  {len(captions)} of {len(samples)}"
        + (f", {np.median([len(words_of(text)) for text in captions]):.0f} words in the middle" if captions else ""),
        *(f"failed    {count} x {reason}" for reason, count in failures.most_common(3)),
    ]
    flawed = sum(flaw_of(text) is not None for text in captions)
    if flawed:
        summary.append(f"flawed    {flawed} captions (file names, boilerplate, ...)")
    return _recipe(url, short, bool(captions), summary), "\n".join(summary)


def _some_samples(shards: list[InputShard]) -> list[Sample]:
    chosen = shards[:: max(1, len(shards) // 8)][:8]
    each = -(-LOOK_AT // len(chosen))
    return [sample for shard in chosen for sample in itertools.islice(read(shard), each)]


def _round_down(side: float) -> int:
    """The largest usual size that is not above `side`, so that few of the pictures seen fall under the rule."""
    return max((size for size in (16, 32, 64, 128, 200, 256, 512, 1024) if size <= side), default=8)


def _recipe(url: str, short_side: int, captioned: bool, summary: list[str]) -> str:
    quoted = "'" + url.replace("'", "''") + "'"
    text_stage = "  text: {type: text_quality}                 # characters, words, first flaw of the caption\n"
    text_rules = (
        "  caption: {column: text.flaw, is_null: true}  # file names, boilerplate, markup, nothing at all\n"
        "  words: {column: text.words, at_least: 2}\n"
    )
    return (
        "".join(f"# {line}\n" for line in summary)
        + f"""input: {{url: {quoted}}}

stages:                                        # measure
  decode: {{}}
{text_stage if captioned else ""}  hash: {{type: perceptual_hash}}

rules:                                         # judge, in this order, rows still alive
  short_side: {{column: decode.short_side, at_least: {short_side}}}
  aspect: {{column: decode.aspect, at_most: 3.0}}
{text_rules if captioned else ""}  exact: {{type: exact_duplicates}}
  near: {{type: near_duplicates, radius: 8}}

# To score captions and looks as well, put weights into a folder, name it in `models:` and add
#   stages:  clip: {{type: clip_score, model: ViT-L-14, pretrained: open_clip_model.safetensors, after: [near]}}
#   rules:   clip_score: {{column: clip.score, at_least: 0.2}}

held_out: {{fraction: 0.02}}                     # whole duplicate groups that training never sees
"""
    )
