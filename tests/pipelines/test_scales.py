"""Thresholds of ViT-B/32 asked of another CLIP: the warning, and the threshold that keeps the same share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.engine import open_engine
from cluster.storage import Folder
from pipelines.recipe import load_recipe
from pipelines.runner import Options, curate, describe_plan, plan_run
from pipelines.scales import _range_warnings, equal_share_threshold
from stages.clip_score import ClipScore
from stages.contract import Context
from tests.pipelines import raw


def test_the_equal_share_threshold_keeps_as_many_rows() -> None:
    rng = np.random.default_rng(0)
    reference, scores = rng.normal(0.3, 0.04, 10_000), rng.normal(0.22, 0.05, 10_000)
    threshold, share = equal_share_threshold(reference, scores, 0.28)
    assert share == pytest.approx((reference >= 0.28).mean())
    assert (scores >= threshold).sum() == (reference >= 0.28).sum()
    assert equal_share_threshold(reference, scores, 2.0) == (None, 0.0)
    assert equal_share_threshold([], [], 0.28) == (None, 0.0)


def test_vit_b_32_is_known_by_name_and_by_architecture(tmp_path: Path) -> None:
    assert ClipScore(model="ViT-B-32").is_b32(Context())
    assert ClipScore(model="ViT-B/32").is_b32(Context())
    assert not ClipScore(model="ViT-L-14").is_b32(Context())
    assert not ClipScore(model="ViT-B-16").is_b32(Context())
    assert not ClipScore(model="no-such-model").is_b32(Context())
    vision = {"image_size": 224, "patch_size": 32, "width": 768, "layers": 12}
    (tmp_path / "mine").mkdir()
    config = {"model_cfg": {"embed_dim": 512, "vision_cfg": vision}}
    (tmp_path / "mine" / "open_clip_config.json").write_text(json.dumps(config))
    assert ClipScore(model=str(tmp_path / "mine")).is_b32(Context())


def test_a_threshold_outside_its_columns_scale_is_told() -> None:
    """0.5 on a scale of about 1 to 10 lets nearly everything pass, and has been a default elsewhere."""
    stages = {
        "clip": {"type": "clip_score", "model": "clip"},
        "aesthetic": {"head": "aesthetic"},
        "safety": {"head": "head.safetensors"},
    }
    rules = {
        "pretty": {"column": "aesthetic.score", "at_least": 0.5},
        "prettier": {"column": "aesthetic.score", "at_least": 5},
        "safe": {"column": "safety.score", "at_most": 30},
        "true": {"column": "clip.score", "at_least": -1},
    }
    assert _range_warnings(load_recipe({"stages": stages, "rules": rules})) == [
        "rules.pretty: at_least 0.5 lies outside the scale of aesthetic.score, about 1..10",
        "rules.safe: at_most 30 lies outside the scale of safety.score, probability 0..1",
    ]


def recipe_of(world: str, **stages: dict) -> dict:
    return {
        "input": {"url": world},
        "stages": {"clip": {"type": "clip_score", "model": "clip", "compute_batch": 16}, **stages},
        "rules": {"clip_score": {"column": "clip.score", "at_least": 0.28}},
    }


def plan_text(recipe: dict, output: Path) -> str:
    store, options = Folder(str(output)), Options(output=str(output), quiet=True)
    with open_engine("local") as engine:
        return describe_plan(plan_run(load_recipe(recipe), options, store, engine), store)


def test_the_plan_warns_and_after_measuring_both_names_the_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped CLIP stands for two models; which of them counts as ViT-B/32 is said by the batch size."""
    world = raw.write_world(tmp_path / "raw", shards=1)
    text = plan_text(recipe_of(world), tmp_path / "out")
    assert "warning   rules.clip_score: 0.28 is a threshold of ViT-B/32's scale, and clip.score is clip's" in text
    assert "add a stage {type: clip_score, model: ViT-B-32" in text
    assert "warning" not in plan_text({**recipe_of(world), "rules": {}}, tmp_path / "out")
    monkeypatch.setattr(ClipScore, "is_b32", lambda self, context: self.compute_batch == 32)
    both = recipe_of(world, b32={"type": "clip_score", "model": "clip", "compute_batch": 32})
    snapshot = curate(load_recipe(both), Options(output=str(tmp_path / "out"), engine="local", quiet=True))
    scores = [row["b32.score"] for table in snapshot.tables("ledger") for row in table.to_pylist()]
    scores = np.array([score for score in scores if score is not None])
    text = plan_text(both, tmp_path / "out")
    share = 100 * (scores >= 0.28).mean()
    assert f"Of {len(scores)} rows that both have measured, ViT-B/32 keeps {share:.1f} %" in text
    assert ("write at_least: " in text) == (share > 0)
