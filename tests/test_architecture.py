"""The arrows between the four packages, read from the source of every module.

    training ──> pipelines ──> stages          stages and cluster are leaves: they import none of the others.
        └──────────┴────────> cluster          Only cluster imports ray; only training imports deepspeed.

Imports inside functions, under `if TYPE_CHECKING` and through importlib count like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "stages": set(),
    "cluster": set(),
    "pipelines": {"stages", "cluster"},
    "training": {"pipelines", "stages", "cluster"},
}
ONLY_IN = {"ray": "cluster", "deepspeed": "training"}
MODULES = sorted(path for package in MAY_IMPORT for path in (REPOSITORY / package).rglob("*.py"))


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of everything that `source` imports; relative imports stay inside their package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def wrong_arrows(package: str, source: str) -> list[str]:
    """A sentence for each import in `source`, a module of `package`, that the drawing above does not have."""
    found = []
    for line, name in imported(source):
        top = name.split(".")[0]
        if top in MAY_IMPORT and top != package and top not in MAY_IMPORT[package]:
            allowed = " and ".join(sorted(MAY_IMPORT[package])) or "none of the other three"
            found.append(f"line {line}: {package} imports {name}, but may import {allowed}")
        elif top in ONLY_IN and ONLY_IN[top] != package:
            found.append(f"line {line}: {package} imports {name}; only {ONLY_IN[top]} may")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_follow_the_arrows(path: Path) -> None:
    package = path.relative_to(REPOSITORY).parts[0]
    assert wrong_arrows(package, path.read_text()) == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("stages", "import pipelines.recipe"),
        ("stages", "def f():\n    from cluster import storage"),
        ("cluster", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from stages.contract import Stage"),
        ("pipelines", "import importlib\nimportlib.import_module('training.loop')"),
        ("pipelines", "def f():\n    import ray.data"),
        ("training", "def f():\n    from ray import train"),
        ("cluster", "import deepspeed"),
    ],
)
def test_the_guard_sees_a_wrong_import(package: str, source: str) -> None:
    assert len(wrong_arrows(package, source)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("training", "import deepspeed\nfrom pipelines import snapshot\nimport cluster.workers, stages.contract"),
        ("pipelines", "from .recipe import Recipe\nfrom stages.contract import Stage"),
        ("cluster", "import ray\nfrom .storage import Storage"),
    ],
)
def test_the_guard_lets_a_right_import_pass(package: str, source: str) -> None:
    assert wrong_arrows(package, source) == []
