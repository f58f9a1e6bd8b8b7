"""FID's network against torch-fidelity's on the same weights, and clean-fid's resizing."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stages.contract import Batch, Context
from stages.decode import EncodedImage
from training.evaluation.features import Inception, clean_resize, read_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the right shapes, whose features neither vanish nor explode."""
    from training.evaluation.features import CLASSES, WIDTH, inception_network

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="not the weights") as refused:
        inception_network({})
    assert "missing" in str(refused.value)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    blank = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    # Its constructor wants a file of weights: let it build the layers, and take their shapes as they are.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save({}, path)
        blank.__init__("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))  # type: ignore[misc]
    state = {}
    for name, value in blank.state_dict().items():
        if name.endswith("conv.weight"):
            state[name] = torch.randn_like(value) * (2 / value[0].numel()) ** 0.5
        elif name.endswith("running_var"):
            state[name] = torch.rand_like(value) + 0.5
        elif value.dtype.is_floating_point:
            state[name] = torch.randn_like(value) * 0.1 + (1.0 if name.endswith("bn.weight") else 0.0)
        else:
            state[name] = value
    assert state["fc.weight"].shape == (CLASSES, WIDTH)
    torch.save(state, path)
    return path


def _batch(pictures: list[Image.Image]) -> Batch:
    images = []
    for picture in pictures:
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        images.append(EncodedImage(stream.getvalue()))
    return Batch({"caption": [""] * len(images)}, images)


def test_the_network_is_torch_fidelitys(weights: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    rng = np.random.default_rng(0)
    # Of the right size already, so that both see the same pixels whatever their resizing.
    pictures = [Image.fromarray(rng.integers(0, 256, (299, 299, 3), dtype=np.uint8)) for _ in range(2)]
    stage = Inception(weights_file=str(weights), compute_batch=16)
    found = stage.open(Context())(_batch(pictures))
    theirs = FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    pixels = torch.stack([torch.from_numpy(np.asarray(picture)).permute(2, 0, 1) for picture in pictures])
    features, logits = theirs(pixels)
    assert features.std() > 0.05
    np.testing.assert_allclose(np.stack(found.values["features"]), features.numpy(), rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(np.stack(found.values["logits"]), logits.numpy(), rtol=2e-3, atol=2e-3)


def test_resizing_is_clean_fids() -> None:
    """Channel by channel in float, antialiased: a fine chequerboard becomes even grey, not moiré."""
    fine = np.indices((1196, 1196)).sum(0) % 2 * 255
    resized = clean_resize(Image.fromarray(np.repeat(fine[..., None], 3, -1).astype(np.uint8)))
    assert resized.shape == (299, 299, 3)
    assert resized.dtype == np.float32
    assert np.abs(resized[5:-5, 5:-5] - 127.5).max() < 1
    steps = np.zeros((32, 32, 3), np.uint8)
    steps[:, 16:] = 255
    enlarged = clean_resize(Image.fromarray(steps))
    assert enlarged.min() == 0  # bicubic overshoots; clipped
    assert enlarged.max() == 255
    assert (enlarged != np.rint(enlarged)).any()  # not rounded to whole numbers


def test_only_tensors_are_read(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "harmed",))

    bad = tmp_path / "bad.pth"
    with open(bad, "wb") as stream:
        pickle.dump({"fc.weight": Harm()}, stream)
    with pytest.raises(ValueError, match="not a file of tensors"):
        read_weights(bad)
    assert not (tmp_path / "harmed").exists()
    torch.save([1, 2], bad)
    with pytest.raises(ValueError, match="no state dict"):
        read_weights(bad)


def test_a_broken_picture_costs_that_picture(weights: Path) -> None:
    stage = Inception(weights_file=str(weights), compute_batch=16)
    batch = Batch({"caption": ["", ""]}, [EncodedImage(b"junk"), *_batch([Image.new("RGB", (40, 30), "red")]).images])
    found = stage.open(Context())(batch)
    assert found.values["features"][0] is None
    assert "not an image" in found.errors[0]
    assert found.values["features"][1].shape == (2048,)
