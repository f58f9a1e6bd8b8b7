"""Every guide does what it says: its code blocks are run, top to bottom, in an empty folder.

Blocks are recognised by their language. ```bash runs in a shell that stops at the first failure and keeps its variables
and folder from block to block; ```python runs in that folder; ```yaml is a recipe that must load, and is written to the
file that its first line names ("# recipe.yaml"), for the blocks after it. Blocks without a language are only shown.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
GUIDES = sorted((REPOSITORY / "docs").glob("*.md"))
LANGUAGES = ("bash", "python", "yaml")
FILE_NAME = re.compile(r"# (?P<name>[\w./-]+\.ya?ml)$")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text and the line it begins on (of the fence)."""

    language: str
    text: str
    line: int


def blocks(guide: str) -> Iterator[Block]:
    """The fenced blocks of a guide that are to be run. Raises ValueError for a fence that is not closed."""
    opened: tuple[str, int] | None = None
    inside: list[str] = []
    for number, line in enumerate(guide.splitlines(), 1):
        if opened is None:
            if line.startswith("```"):
                opened, inside = (line[3:].strip(), number), []
        elif line.startswith("```"):
            if opened[0] in LANGUAGES:
                yield Block(opened[0], "\n".join(inside) + "\n", opened[1])
            opened = None
        else:
            inside.append(line)
    if opened is not None:
        raise ValueError(f"the block that begins on line {opened[1]} is not closed: end it with ```")


def script(name: str, guide: str) -> str:
    """One shell script that does what the guide's blocks say, and on failure names the line of the guide."""
    parts = ["set -euo pipefail", "trap 'echo \"failed: the block at $BLOCK\" >&2' ERR"]
    for number, block in enumerate(blocks(guide)):
        parts.append(f"BLOCK={name}:{block.line}")
        if block.language == "bash":
            parts.append(block.text)
        elif block.language == "python":
            parts.append(heredoc("python -", block.text, number))
        else:
            file_name = FILE_NAME.match(block.text.partition("\n")[0])
            target = file_name["name"] if file_name else f"block-{block.line}.yaml"
            parts.append(heredoc(f"cat > {target}", block.text, number))
            parts.append(f"{shlex.quote(sys.executable)} -c {shlex.quote(LOAD_RECIPE)} {target}")
    return "\n".join(parts) + "\n"


def heredoc(command: str, text: str, number: int) -> str:
    return f"{command} <<'END_OF_BLOCK_{number}'\n{text}END_OF_BLOCK_{number}"


# A recipe that measures or judges is for curation; the others train.
LOAD_RECIPE = """
import sys, yaml, pipelines.recipe, training.recipe
keys = yaml.safe_load(open(sys.argv[1]))
kind = pipelines if {"input", "stages", "rules"} & set(keys) else training
kind.recipe.load_recipe(sys.argv[1])
"""


def run(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # The console script's folder comes first, so that `sluice` and `python` are this environment's.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", text], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=900
    )


@pytest.mark.full
@pytest.mark.timeout(960)
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_a_guide_does_what_it_says(guide: Path, tmp_path: Path) -> None:
    folder = tmp_path / "guide"
    folder.mkdir()
    done = run(script(guide.name, guide.read_text()), folder)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


GUIDE = """
```yaml
# small.yaml
stages: {{decode: {{}}}}
```
Shown only:
```
exit 7
```
```python
from pathlib import Path
Path("made").write_text("by python")
```
```bash
word=$(cat made)
```
```bash
test "$word" = "by python" && test -e small.yaml
{last}
```
"""


@pytest.mark.parametrize(
    ("last", "status", "said"),
    [("true", 0, ""), ("false", 1, "failed: the block at guide.md:17"), ("echo $unset_name", 1, "unset_name")],
)
def test_blocks_run_in_order_and_a_failure_names_its_line(last: str, status: int, said: str, tmp_path: Path) -> None:
    done = run(script("guide.md", GUIDE.format(last=last)), tmp_path)
    assert done.returncode == status, done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    ("recipe", "nearest"), [("stages: {decode: {max_pixel: 9}}", "max_pixels"), ("optimiser: {lr: 1}", "optimizer")]
)
def test_a_recipe_that_does_not_load_fails_the_guide(recipe: str, nearest: str, tmp_path: Path) -> None:
    done = run(script("guide.md", f"```yaml\n{recipe}\n```\n"), tmp_path)
    assert done.returncode != 0
    assert nearest in done.stderr, "the nearest known key should be named"


def test_every_guide_is_closed_and_every_link_leads_somewhere() -> None:
    pages: list[Path] = [*GUIDES, REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
    missing = []
    for page in pages:
        text = page.read_text()
        list(blocks(text))
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            if not (page.parent / target).exists():
                missing.append(f"{page.name}: {target}")
    assert missing == []
