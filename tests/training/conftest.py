"""What several files here train on: one small snapshot and text encoder a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.small import write_snapshot, write_text_encoder


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with snapshot/ and text_encoder/."""
    root = tmp_path_factory.mktemp("ground")
    write_snapshot(root / "snapshot")
    write_text_encoder(root / "text_encoder")
    return root
