"""Recipes: what is refused, and in which words."""

import pytest

from cluster.storage import natural_key
from pipelines.plan import check_flow
from pipelines.recipe import RecipeError, load_recipe

GOOD = {
    "stages": {"decode": {}, "hash": {"type": "perceptual_hash"}},
    "rules": {"short": {"column": "decode.short_side", "at_least": 64}, "near": {"type": "near_duplicates"}},
}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rules.shrt.at_least=2", "did you mean 'short'"),
        ("rules.short.atleast=2", "did you mean 'at_least'"),
        ("rules.near.radius=many", "rules.near.radius: input should be a valid integer"),
        ("rules.near.radius=20", "radius 20 .* not in 0..11"),
        ("stags.decode=1", "did you mean 'stages'"),
        ("held_out.fraction=1.5", "held_out.fraction 1.5"),
        ("nothing", "not of the form"),
    ],
)
def test_a_wrong_override_is_refused_with_the_nearest_right_one(override, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(GOOD, [override])


def test_an_override_is_read_as_yaml_and_coerced_by_field(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("stages: {decode: {}}\nrules: {short: {column: decode.short_side, at_least: 3e1}}\n")
    assert load_recipe(path).rules["short"].at_least == 30.0
    assert load_recipe(path, ["rules.short.at_least=6.4e1"]).rules["short"].at_least == 64.0


def test_yaml_that_would_build_objects_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("stages: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("stages", "rules", "words"),
    [
        (
            {"decode": {}},
            {"near": {"type": "near_duplicates"}},
            "rules.near needs the column 'hash.phash64', which no stage adds",
        ),
        ({"decode": {}}, {"a": {"column": "decode.shortside", "at_least": 1}}, "stages.decode adds only width"),
        (
            {"aesthetic": {"head": "h", "embedding": "clip.image_embedding"}, "clip": {"type": "clip_score"}},
            {},
            "move stages.clip before it",
        ),
        (
            {"decode": {}, "clip": {"type": "clip_score", "after": ["small"]}},
            {"small": {"column": "decode.width", "at_least": 1}, "x": {"column": "clip.score", "at_least": 0}},
            None,
        ),
        (
            {"decode": {}, "clip": {"type": "clip_score", "after": ["small"]}},
            {"x": {"column": "clip.score", "at_least": 0}, "small": {"column": "decode.width", "at_least": 1}},
            "move rules.x below it",
        ), ({"decode": {}, "clip": {"type": "clip_score", "after": ["smal"]}}, {"small": {"column": "decode.width",
        "at_least": 1}},
         "did you mean 'small'"),
    ],
)  # fmt: skip
def test_a_column_must_be_measured_before_it_is_needed(stages, rules, words):
    recipe = load_recipe({"stages": stages, "rules": rules})
    if words is None:
        assert check_flow(recipe)["clip"] == 1
    else:
        with pytest.raises(RecipeError, match=words):
            check_flow(recipe)


def test_shards_come_in_natural_order():
    names = ["10.tar", "9.tar", "a2b10.tar", "a2b9.tar"]
    assert sorted(names, key=natural_key) == ["9.tar", "10.tar", "a2b9.tar", "a2b10.tar"]
