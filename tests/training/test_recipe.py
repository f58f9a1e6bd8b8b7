"""Training recipes: read to the last key, coerced by the field's type, refused with what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from training.recipe import RESOURCES, Recipe, RecipeError, changes_to, load_recipe, numeric, override_at

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_numbers_that_yaml_reads_as_strings_are_coerced(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("optimizer: {lr: 3e-4}\ncache_bytes: 2e9\n")
    recipe = load_recipe(path, ["optimizer.betas=[0.9, 0.99]", "batch.global_batch=128"])
    assert recipe.optimizer.lr == 3e-4
    assert recipe.optimizer.betas == (0.9, 0.99)
    assert recipe.cache_bytes == 2_000_000_000
    assert recipe.accumulation() == 4
    assert numeric({"sigma": {"shift": "3e0", "kind": "logit_normal"}}) == {
        "sigma": {"shift": 3.0, "kind": "logit_normal"}
    }


@pytest.mark.parametrize(
    ("given", "overrides", "sentence"),
    [
        ({"optimiser": {}}, [], "did you mean 'optimizer'"),
        ({"optimizer": {"warmup": 3}}, [], "did you mean 'warmup_steps'"),
        ({"batch": {"global_batch": 63}}, [], "micro_batch 21 would do"),
        ({"zero_stage": 4}, [], "zero_stage: input should be 0, 1, 2 or 3"),
        ({"precision": "fp16"}, [], "'fp32' or 'bf16'"),
        ({"steps": "many"}, [], "steps: input should be a valid integer"),
        ({"ema_decay": 1.0}, [], "ema_decay: input should be less than 1"),
        ({}, ["optimizer.lr"], "not of the form optimizer.lr=3e-4"),
        ({"steps": 3}, ["steps.x=3"], "steps is 3, not a table"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_a_repair(given: dict, overrides: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(given, overrides)


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(RecipeError, match="holds list, not the keys of a training recipe"):
        load_recipe(path)


def test_the_rate_warms_up_and_stays() -> None:
    optimizer = load_recipe({"optimizer": {"lr": 1.0, "warmup_steps": 4}}).optimizer
    assert [optimizer.lr_at(step, 1000) for step in (0, 1, 3, 4, 100)] == [0.25, 0.5, 1.0, 1.0, 1.0]


def test_resources_are_not_part_of_who_a_run_is() -> None:
    small = load_recipe({"workers": 1, "zero_stage": 0, "steps": 10})
    large = load_recipe({"workers": 2, "zero_stage": 3, "steps": 20, "batch": {"global_batch": 64, "micro_batch": 32}})
    assert small.digest() == large.digest() != load_recipe({"seed": 1}).digest()
    assert set(Recipe.model_fields) >= RESOURCES
    before, after = small.plain(), override_at(small.plain(), "optimizer.lr=5")
    assert changes_to(before, after) == [("optimizer.lr", 1e-4, 5)]


@pytest.mark.parametrize(
    "path", sorted([*CONFIGS.glob("train_*.yaml"), *CONFIGS.glob("distill_*.yaml")]), ids=lambda p: p.name
)
def test_every_recipe_that_is_shipped_loads(path: Path) -> None:
    from training.objectives import build_objective

    recipe: Any = load_recipe(path)
    # Said in the file: DeepSpeed takes silence for 1.0, SANA means 0.1.
    assert "gradient_clipping" in yaml.safe_load(path.read_text())["optimizer"]
    assert build_objective(numeric(recipe.objective)).options()["type"] == recipe.objective["type"]


def test_the_rate_falls_to_zero_over_the_last_steps_where_that_is_asked_for() -> None:
    optimizer = load_recipe({"optimizer": {"lr": 1.0, "warmup_steps": 2, "decay_steps": 4}}).optimizer
    assert [optimizer.lr_at(step, 10) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
