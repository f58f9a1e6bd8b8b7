"""`sluice demo`: the whole path on a made-up world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands of this room to the command line."""
    app.command("demo")(demo_command)


def demo_command(
    output: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo-output"),
    scenes: Annotated[int, typer.Option(min=60, help="Drawn scenes in the made-up world.")] = 4000,
    seed: Annotated[int, typer.Option(help="Seed of the world.")] = 0,
    teacher_steps: Annotated[int, typer.Option(min=0, help="Training steps of the teacher; 0: the recipe's.")] = 0,
    student_steps: Annotated[int, typer.Option(min=0, help="Training steps of the student; 0: the recipe's.")] = 0,
    judged: Annotated[int, typer.Option(min=4, help="Prompts drawn and judged by reading pixels.")] = 200,
    workers: Annotated[int, typer.Option(min=1, help="Ray and training workers.")] = 2,
) -> None:
    """Draw a flawed world, curate it, train a teacher on what is left, distil a student, and show all of it.

    Example: sluice demo --output demo-output
    """
    from pipelines.demo.story import Story

    Story(output.absolute(), scenes, seed, teacher_steps, student_steps, judged, workers).tell()
