"""Aesthetic scores against the heads as torch runs them; LAION's own files where they lie beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import Dropout, Linear

from stages.aesthetic import Aesthetic
from stages.contract import Batch, Context

SHARED_DATA = Path(os.environ.get("SLUICE_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")


def laion_layers(width: int) -> torch.nn.Sequential:
    """The improved predictor as published: no activations between its layers."""
    return torch.nn.Sequential(
        Linear(width, 1024),
        Dropout(0.2),
        Linear(1024, 128),
        Dropout(0.2),
        Linear(128, 64),
        Dropout(0.1),
        Linear(64, 16),
        Linear(16, 1),
    ).eval()


def embeddings(count: int, width: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def score(head: Path, vectors: list) -> tuple[list, list]:
    batch = Batch({"clip.image_embedding": vectors})
    answer = Aesthetic(head=head.name).open(Context(models=(str(head.parent),)))(batch)
    return list(answer.values["score"]), list(answer.errors or [])


@pytest.mark.parametrize("extension", ["pth", "safetensors"])
def test_an_mlp_gives_what_its_layers_give(tmp_path: Path, extension: str) -> None:
    torch.manual_seed(0)
    layers = laion_layers(48)
    state = {f"layers.{name}": value for name, value in layers.state_dict().items()}
    file = tmp_path / f"head.{extension}"
    if extension == "pth":
        torch.save(state, file)
    else:
        save_file(state, file)
    vectors = embeddings(10, 48)
    with torch.no_grad():
        unit = torch.nn.functional.normalize(torch.from_numpy(vectors.astype(np.float32)), dim=-1)
        expected = layers(unit)[:, 0].numpy()
    scores, errors = score(file, list(vectors))
    assert np.allclose(scores, expected, atol=1e-5)
    assert errors == [None] * 10


def test_a_linear_head_gives_weight_times_embedding_plus_bias(tmp_path: Path) -> None:
    torch.save({"weight": torch.tensor([[1.0, 2.0, -1.0]]), "bias": torch.tensor([5.0])}, tmp_path / "linear.pth")
    scores, _ = score(tmp_path / "linear.pth", [[0.6, 0.8, 0.0], [0.0, 0.0, 3.0]])
    assert scores == pytest.approx([0.6 + 1.6 + 5, 4.0])  # the second vector is brought to unit length


def test_a_row_without_a_usable_embedding_gets_a_reason(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, tmp_path / "linear.pth")
    scores, errors = score(tmp_path / "linear.pth", [None, [0.0, 0.0], [1.0, 0.0], [np.nan, 1.0]])
    assert scores == [None, None, 1.0, None]
    assert errors == ["no clip.image_embedding", "embedding without a direction", None, "embedding without a direction"]


def test_a_head_for_another_clip_is_refused_with_both_sizes(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1, 768), "bias": torch.zeros(1)}, tmp_path / "linear.pth")
    with pytest.raises(ValueError, match=r"has 512 numbers, but linear\.pth was trained on 768"):
        score(tmp_path / "linear.pth", [np.ones(512)])


def test_files_that_are_no_head_are_refused(tmp_path: Path) -> None:
    context = Context(models=(str(tmp_path),))
    torch.save({"weight": torch.ones(2, 8)}, tmp_path / "two.pth")
    torch.save({"layers.0.weight": torch.ones(4, 8), "layers.2.weight": torch.ones(1, 5)}, tmp_path / "broken.pth")
    torch.save({"conv.weight": torch.ones(1, 3, 3, 3)}, tmp_path / "conv.pth")
    for name, reason in {"two": "ends in 2 numbers", "broken": "do not fit each other", "conv": "no chain"}.items():
        with pytest.raises(ValueError, match=reason):
            Aesthetic(head=f"{name}.pth").open(context)
    with pytest.raises(FileNotFoundError, match="were not found"):
        Aesthetic(head="absent.pth").weights(context)


def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported"):
        Aesthetic(head="trap.pth").open(Context(models=(str(tmp_path),)))
    assert not (tmp_path / "sprung").exists()


def test_the_stage_needs_the_embedding_it_was_told() -> None:
    assert Aesthetic(head="x.pth", embedding="b32.image_embedding").needs == ("b32.image_embedding",)


def assert_rises_as_the_formula_says(head: Path, ratings: list[np.ndarray]) -> None:
    """Ten rating embeddings score strictly higher one after the other, and each weight . embedding + bias to 1e-5."""
    scores, errors = score(head, ratings)
    assert not any(errors)
    assert (np.diff(scores) > 0).all()
    state = torch.load(head, map_location="cpu", weights_only=True)
    with torch.no_grad():
        plain = torch.from_numpy(np.stack(ratings)) @ state["weight"].T + state["bias"]
    assert np.abs(np.array(scores) - plain[:, 0].numpy()).max() < 1e-5


@pytest.mark.parametrize("width", [512, 768])
def test_rating_embeddings_score_in_order_with_a_made_up_head(tmp_path: Path, width: int) -> None:
    """Files in the format of LAION's linear heads and rating embeddings, with numbers of our own."""
    torch.manual_seed(width)
    head = Linear(width, 1)
    torch.save(head.state_dict(), tmp_path / "linear.pth")
    direction = head.weight.detach().numpy()[0]
    rest = np.random.default_rng(width).normal(size=(10, width))
    raw = rest + np.linspace(-40, 40, 10)[:, None] * direction
    ratings = (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)
    assert_rises_as_the_formula_says(tmp_path / "linear.pth", list(ratings))


needs_laion = pytest.mark.skipif(
    not (SHARED_DATA / "weights").is_dir(), reason=f"LAION's heads are not here: no {SHARED_DATA / 'weights'}"
)


@needs_laion
@pytest.mark.parametrize(("letters", "file"), [("b_32", "vit_b_32"), ("l_14", "vit_l_14")])
def test_laions_linear_heads_score_its_rating_embeddings_in_order(letters: str, file: str) -> None:
    folder = SHARED_DATA / "weights" / "laion_aesthetic_linear"
    ratings = [np.load(folder / f"{file}_embeddings" / f"rating{rating}.npy").ravel() for rating in range(10)]
    assert_rises_as_the_formula_says(folder / f"sa_0_4_vit_{letters}_linear.pth", ratings)


@needs_laion
def test_laions_mlp_opens_and_gives_what_its_layers_give() -> None:
    file = SHARED_DATA / "weights" / "improved_aesthetic_mlp" / "sac+logos+ava1-l14-linearMSE.pth"
    layers = laion_layers(768)
    state = torch.load(file, map_location="cpu", weights_only=True)
    layers.load_state_dict({name.removeprefix("layers."): value for name, value in state.items()})
    vectors = embeddings(20, 768)
    with torch.no_grad():
        unit = torch.nn.functional.normalize(torch.from_numpy(vectors.astype(np.float32)), dim=-1)
        expected = layers(unit)[:, 0].numpy()
    scores, _ = score(file, list(vectors))
    assert np.allclose(scores, expected, atol=1e-4)
    assert 0 < np.mean(scores) < 10
