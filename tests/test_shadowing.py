"""A user's own `training.py`, `cluster.py`, `stages/` and `pipelines/` shadow nothing of Sluice's.

The four packages have plain names, and users keep files of the same names in the folder they work in. Neither the
console script nor Ray's workers, whose path begins with the driver's working directory, may pick those up.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

SHADOWS = ("training.py", "cluster.py", "stages/__init__.py", "pipelines/__init__.py")
SHADOW = """
with open({mark!r}, "a") as mark:
    print(__file__, file=mark)
raise ImportError("the user's own " + __file__)
"""
RECIPE = """
input: {url: photos}
stages:
  decode: {}
  hash: {type: perceptual_hash}
rules:
  short_side: {column: decode.short_side, at_least: 8}
held_out: {fraction: 0}
"""
TRAIN_RECIPE = """
model: {size: tiny}
resolution: 32
autoencoder: {type: pixel_shuffle, factor: 4}
text_encoder: {folder: text_encoder, max_tokens: 48}
batch: {global_batch: 4, micro_batch: 4}
steps: 1
"""


@pytest.fixture
def users_folder(tmp_path: Path) -> Path:
    """A working directory with a recipe, four pictures, and modules that leave a mark and raise when imported."""
    folder = tmp_path / "work"
    for name in SHADOWS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SHADOW.format(mark=str(folder / "imported.txt")))
    (folder / "photos").mkdir()
    for number in range(4):
        picture = Image.linear_gradient("L").rotate(90 * number).resize((64 + number, 48)).convert("RGB")
        picture.save(folder / "photos" / f"{number}.png")
        (folder / "photos" / f"{number}.txt").write_text(f"gradient number {number}")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def imported(folder: Path) -> str:
    """What was imported from the user's folder, one file a line."""
    mark = folder / "imported.txt"
    return mark.read_text() if mark.exists() else ""


def test_the_shadows_bite_when_the_folder_comes_first(users_folder: Path) -> None:
    """Without this the other tests could pass for want of a trap."""
    for module in ("training", "cluster", "stages", "pipelines"):
        done = subprocess.run([sys.executable, "-c", f"import {module}"], cwd=users_folder, capture_output=True)
        assert done.returncode != 0
    assert len(imported(users_folder).splitlines()) == len(SHADOWS)


def test_the_console_script_imports_its_own_packages(users_folder: Path, sluice: Callable[..., object]) -> None:
    sluice("--help", cwd=users_folder)
    assert imported(users_folder) == ""


def test_ray_workers_import_their_own_packages(users_folder: Path, sluice: Callable[..., object]) -> None:
    sluice("curate", "recipe.yaml", "--output", "out", cwd=users_folder)
    assert imported(users_folder) == ""
    assert (users_folder / "out" / "latest").read_text().strip()


@pytest.mark.full
def test_training_workers_import_their_own_packages(users_folder: Path, sluice: Callable[..., object]) -> None:
    (users_folder / "train.yaml").write_text(TRAIN_RECIPE)
    sluice("curate", "recipe.yaml", "--output", "out", "--local", cwd=users_folder)
    sluice("train", "train.yaml", "--data", "out", "--output", "run", cwd=users_folder)
    assert imported(users_folder) == ""
    assert (users_folder / "run" / "model" / "model.json").exists()
