"""Checkpoints and model folders: found, checked, passed over, refused. (Saving and loading itself: test_loop.)"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training import checkpoint as ckpt


def written(run: Path, step: int, **meta: object) -> Path:
    """A checkpoint as `save` leaves it, with one file in it."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.json").write_text(json.dumps({"schema_version": "1.0"}))
    digest, size = ckpt._digest_and_flush(folder / "model" / "model.json")
    files = {"model/model.json": {"sha256": digest, "size_bytes": size}}
    facts = {"workers": 2, "zero_stage": 2, "precision": "bf16", **meta}
    ckpt.write_json(folder / "meta.json", {"step": step, "files": files, **facts})
    return folder


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    for step in (20, 100, 3):
        written(tmp_path, step)
    (tmp_path / "checkpoints" / "step-000200").mkdir()
    assert [path.name for path in ckpt.checkpoints(tmp_path)] == ["step-000003", "step-000020", "step-000100"]
    (tmp_path / "checkpoints" / ".step-000300.abc").mkdir()
    ckpt.sweep(tmp_path)
    assert not (tmp_path / "checkpoints" / ".step-000300.abc").exists()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda path: path.unlink(), "model/model.json is missing"),
        (lambda path: path.write_text("{}"), "has 2 bytes, expected"),
        (lambda path: path.write_text(path.read_text().replace("1.0", "9.9")), "was changed since it was written"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, spoil: object, sentence: str) -> None:
    good, bad = written(tmp_path, 10), written(tmp_path, 20)
    spoil(bad / "model" / "model.json")  # type: ignore[operator]
    said: list[str] = []
    assert ckpt.newest_sound(tmp_path, said.append) == good
    assert sentence in said[0]
    assert "step-000020 is damaged" in said[0]


@pytest.mark.parametrize(
    ("workers", "stage", "precision", "sentence"),
    [
        (4, 2, "bf16", r"written with workers 2, this run has workers 4: continue with --set workers=2"),
        (2, 3, "bf16", r"zero_stage 2, this run has zero_stage 3"),
        (2, 2, "fp32", r"precision bf16, this run has precision fp32"),
    ],
)
def test_another_shape_is_refused(tmp_path: Path, workers: int, stage: int, precision: str, sentence: str) -> None:
    with pytest.raises(ckpt.CheckpointError, match=sentence):
        ckpt.refuse_mismatch(written(tmp_path, 10), workers, stage, precision)


def test_a_later_attempt_ends_the_earlier_one(tmp_path: Path) -> None:
    first = ckpt.Guard.begin(tmp_path, "first")
    first.check()
    second = ckpt.Guard.begin(tmp_path, "second")
    second.check()
    with pytest.raises(ckpt.SupersededError):
        first.check()


def test_what_a_model_address_may_be(tmp_path: Path) -> None:
    older, newer = written(tmp_path, 10), written(tmp_path, 20)
    assert ckpt.find_model(tmp_path) == newer / "model"
    assert ckpt.find_model(older) == older / "model"
    published = ckpt.publish(older, tmp_path)
    assert ckpt.find_model(tmp_path) == published == ckpt.find_model(tmp_path / "model")
    with pytest.raises(ckpt.CheckpointError, match="there is no model here"):
        ckpt.find_model(tmp_path / "nowhere")


def test_a_model_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps({"schema_version": "2.0"}))
    with pytest.raises(ckpt.CheckpointError, match=r"schema version '2.0', this version reads 1.0"):
        ckpt.read_model(tmp_path)


def test_json_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    ckpt.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        ckpt.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
