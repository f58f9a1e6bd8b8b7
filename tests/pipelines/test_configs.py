"""Every curation recipe that users copy runs as it stands, with the small shipped models put in for the large ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipelines.recipe import load_recipe
from pipelines.runner import Options, curate
from tests.pipelines import raw
from tests.stages.small_vlm import write_vlm

ROOT = Path(__file__).resolve().parents[2]
CURATION = [path for path in sorted(ROOT.glob("configs/*.yaml")) if "stages" in yaml.safe_load(path.read_text())]
# The made-up pictures are small, and the small CLIP and its head have other names than the real ones.
INSTEAD = {
    "curate": [
        "rules.short_side.at_least=32",
        "stages.clip.model=clip",
        "stages.clip.pretrained=''",
        "stages.probe.model=clip",
        "stages.probe.pretrained=''",
        "rules.flat.at_most=1",
        "stages.aesthetic.head=aesthetic",
        "rules.clip_score.at_least=-1",
    ],
    "recaption": [
        "rules.short_side.at_least=32",
        "stages.clip.model=clip",
        "stages.clip.pretrained=''",
        "stages.scores.model=clip",
        "stages.scores.pretrained=''",
        "stages.long.max_tokens=4",
    ],
}


@pytest.mark.parametrize("config", CURATION, ids=lambda path: path.stem)
def test_a_recipe_that_users_copy_runs(config, tmp_path):
    url = raw.write_world(tmp_path / "raw", shards=1)
    recipe = load_recipe(config, [f"input.url={url}", *INSTEAD.get(config.stem, [])])
    models = ()
    if config.stem == "recaption":  # a small captioner under the large one's name
        models = (str(write_vlm(tmp_path / "models" / recipe.stages["long"].model).parent),)
    options = Options(output=str(tmp_path / "out"), engine="local", models=models, quiet=True, report=False)
    snapshot = curate(recipe, options)
    steps = {step["rule"]: step["rejected"] for step in snapshot.manifest["funnel"]["steps"]}
    if config.stem == "alt_text":
        assert (steps["flaw"], steps["words"]) == (1, 0)  # the row without a caption; pictures are not looked at
        return
    assert steps["exact"] == steps["near"] == 1
    if config.stem == "recaption":
        made = [row for table in snapshot.tables("captions") for row in table.to_pylist() if row["captioner"]]
        assert len(made) == 11 * 4  # two prompts, two captions each, of every row that passes the rules before it
    if config.stem == "curate":
        assert snapshot.manifest["funnel"]["kept"] == 5
        assert snapshot.manifest["cuts"]["aesthetic"]["of"] == 10


def test_there_are_recipes_to_copy():
    assert {path.stem for path in CURATION} >= {"alt_text", "curate", "dedupe"}
