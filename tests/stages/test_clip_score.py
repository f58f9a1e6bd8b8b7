"""CLIP score against open_clip's own preprocessing and a cosine taken by hand; odd rows; shapes of forward passes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stages.clip_score import ClipScore, fast_pixels
from stages.contract import Batch, Context
from stages.decode import EncodedImage

CONFIG = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]},
}
TEXTS = ["a red square", "Two dogs!", "a very long caption that goes on for many more words than twelve tokens hold"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models with one small random CLIP in open_clip's local format, "tiny"."""
    folder = tmp_path_factory.mktemp("models")
    tiny = folder / "tiny"
    tiny.mkdir()
    (tiny / "open_clip_config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{tiny}", load_weights=False)
    save_file(model.state_dict(), tiny / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def context(models: Path) -> Context:
    return Context(models=(str(models),))


def picture(seed: int, size: tuple[int, int] = (40, 50)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def data_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def batch_of(images: list[bytes | None], texts: list[str | None]) -> Batch:
    return Batch({"caption": texts}, [EncodedImage(data) for data in images])


def by_hand(models: Path, images: list[Image.Image], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and unit embeddings by open_clip's public API, one pair at a time."""
    name = f"local-dir:{models / 'tiny'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    cosines, embeddings = [], []
    with torch.no_grad():
        for image, text in zip(images, texts, strict=True):
            a = model.encode_image(preprocess(image)[None])[0].double().numpy()
            b = model.encode_text(tokenizer([text]))[0].double().numpy()
            cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)))
            embeddings.append(a / np.sqrt(a @ a))
    return np.array(cosines), np.array(embeddings)


def test_scores_and_embeddings_are_those_of_open_clip(models: Path, context: Context) -> None:
    images = [picture(i) for i in range(3)]
    answer = ClipScore(model="tiny").open(context)(batch_of([data_of(image) for image in images], list(TEXTS)))
    cosines, embeddings = by_hand(models, images, TEXTS)
    assert answer.errors == [None] * 3
    assert np.allclose(answer.values["score"], cosines, atol=1e-5)
    assert np.stack(answer.values["image_embedding"]).dtype == np.float16
    assert np.allclose(np.stack(answer.values["image_embedding"]), embeddings, atol=1e-3)
    assert len(set(np.round(cosines, 4))) == 3


def photographic(seed: int, size: tuple[int, int]) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(900, 600), (300, 500), (20, 28), (224, 224)])
def test_fast_preprocessing_is_near_open_clips_own(models: Path, context: Context, size: tuple[int, int]) -> None:
    images = [photographic(seed, size) for seed in range(6)]
    batch = batch_of([data_of(image, "JPEG", quality=92) for image in images], [TEXTS[0]] * 6)
    exact, fast = (
        ClipScore(model="tiny", preprocessing=how).open(context)(batch)  # type: ignore[arg-type]
        for how in ("exact", "fast")
    )
    assert fast.errors == [None] * 6
    assert np.abs(np.subtract(fast.values["score"], exact.values["score"])).max() < 0.02
    for a, b in zip(fast.values["image_embedding"], exact.values["image_embedding"], strict=True):
        assert a.astype(float) @ b.astype(float) > 0.995
    # Near, not equal: a row's identity says which of the two it is.
    assert ClipScore(preprocessing="fast").identity() != ClipScore().identity()


def test_fast_preprocessing_takes_the_middle_square_or_squashes() -> None:
    pixels = np.zeros((64, 160, 3), np.uint8)
    pixels[:, 48:112] = 200
    assert fast_pixels(pixels, 32).min() == 200
    squashed = fast_pixels(pixels, 32, squash=True)
    assert (squashed[:, 2].max(), squashed[:, 16].min()) == (0, 200)


def test_rows_prepared_in_other_threads_give_the_same_numbers(context: Context) -> None:
    batch = batch_of([data_of(picture(i)) for i in range(20)] + [b"garbage"], ["a red square"] * 21)
    measure: Any = ClipScore(model="tiny", compute_batch=16).open(context)
    alone = measure(batch)
    with ThreadPoolExecutor(4) as threads:
        answer = measure.compute(list(threads.map(lambda row: measure.prepare(batch, row), range(21))))
    assert answer.values["score"] == alone.values["score"]
    assert answer.errors == alone.errors
    assert answer.errors[20]


def test_tokens_are_counted_with_start_and_end_and_cut_at_the_context(context: Context) -> None:
    answer = ClipScore(model="tiny").open(context)(batch_of([data_of(picture(0))] * 3, list(TEXTS)))
    assert answer.values["text_tokens"] == [5, 5, 12]


def test_a_row_without_picture_or_caption_gets_a_reason_and_leaves_its_neighbours_alone(context: Context) -> None:
    good = data_of(picture(1))
    measure = ClipScore(model="tiny").open(context)
    alone = measure(batch_of([good], ["a red square"]))
    answer = measure(batch_of([b"garbage", good, good, None, good], ["a red square", "", None, "a red square", "x"]))
    assert [bool(error) for error in answer.errors or []] == [True, True, True, True, False]
    assert answer.errors[1:3] == ["no caption"] * 2  # type: ignore[index]
    assert answer.values["score"][:4] == [None] * 4
    assert answer.values["image_embedding"][0] is None
    mixed = measure(batch_of([good, b"garbage"], ["a red square", "a red square"]))
    assert mixed.values["score"][0] == alone.values["score"][0]
    assert np.array_equal(mixed.values["image_embedding"][0], alone.values["image_embedding"][0])


def test_every_forward_pass_has_the_shape_of_the_compute_batch(context: Context) -> None:
    measure: Any = ClipScore(model="tiny", compute_batch=16).open(context)
    shapes = []
    original = measure.model.encode_image
    measure.model.encode_image = lambda x: shapes.append(tuple(x.shape)) or original(x)
    images = [data_of(picture(i)) for i in range(35)]
    answer = measure(batch_of(images, ["a red square"] * 35))
    assert shapes == [(16, 3, 32, 32)] * 3
    # Batches cut at the same rows give the same bits, however they are handed over.
    parts = [measure(batch_of(images[i : i + 16], ["a red square"] * len(images[i : i + 16]))) for i in (0, 16, 32)]
    assert answer.values["score"] == [score for part in parts for score in part.values["score"]]


def test_numbers_do_not_depend_on_the_threads_of_the_process(context: Context) -> None:
    batch = batch_of([data_of(picture(i)) for i in range(20)], ["a red square"] * 20)
    measure = ClipScore(model="tiny").open(context)
    before = torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append(measure(batch).values["score"])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert answers[0] == answers[1] == answers[2]


def test_pictures_are_turned_upright_and_laid_on_white(context: Context) -> None:
    upright = picture(5, (40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it a quarter clockwise
    turned = data_of(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    clear = upright.convert("RGBA")
    clear.paste((200, 10, 10, 0), (0, 0, 40, 30))
    on_white = upright.copy()
    on_white.paste((255, 255, 255), (0, 0, 40, 30))
    images = [data_of(upright), turned, data_of(on_white), data_of(clear)]
    scores = ClipScore(model="tiny").open(context)(batch_of(images, ["a red square"] * 4)).values["score"]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert scores[2] == pytest.approx(scores[3], abs=1e-6)
    assert scores[0] != pytest.approx(scores[2], abs=1e-6)


def test_bf16_is_near_fp32_and_not_the_same(context: Context) -> None:
    batch = batch_of([data_of(picture(i)) for i in range(8)], ["a red square"] * 8)
    full = np.array(ClipScore(model="tiny").open(context)(batch).values["score"])
    half = np.array(ClipScore(model="tiny", precision="bf16").open(context)(batch).values["score"])
    assert 0 < np.abs(full - half).max() < 0.02


def test_columns_know_the_length_of_the_embedding(models: Path, context: Context) -> None:
    stage = ClipScore(model="tiny")
    assert [column.name for column in stage.adds] == ["score", "text_tokens", "image_embedding"]
    assert stage.columns(context)[2].type == "halffloat[24]"
    assert ClipScore(model=str(models / "tiny")).adds[2].type == "halffloat[24]"
    assert ClipScore(model=f"local-dir:{models / 'tiny'}").adds[2].type == "halffloat[24]"
    assert ClipScore(model="ViT-L-14").adds[2].type == "halffloat[768]"
    assert ClipScore(model="ViT-L-14").adds[2].feature


def test_where_weights_lie_is_no_part_of_the_identity_and_cost_grows_with_the_model(models: Path) -> None:
    stage = ClipScore(model=str(models / "tiny"))
    assert stage.identity() == ClipScore(model="tiny").identity()
    assert 2 < stage.cpu_ms_per_row < 10
    assert 1000 < ClipScore(model="ViT-L-14").cpu_ms_per_row < 10_000
    assert 50 < ClipScore(model="ViT-B-32").cpu_ms_per_row < 500


def test_weights_are_the_files_that_decide_the_result(models: Path, context: Context) -> None:
    files = ClipScore(model="tiny").weights(context)
    assert set(files) == {"open_clip_config.json", "open_clip_model.safetensors"}
    assert all(file.is_file() for file in files.values())


def test_a_built_in_model_opens_from_a_weights_file(tmp_path: Path) -> None:
    name = "ViT-S-32-alt"
    model = open_clip.create_model(name).eval()
    torch.save(model.state_dict(), tmp_path / "small.pt")
    context = Context(models=(str(tmp_path),))
    stage = ClipScore(model=name, pretrained="small.pt", compute_batch=16)
    assert set(stage.weights(context)) == {"small.pt"}
    image = picture(3)
    answer = stage.open(context)(batch_of([data_of(image)], ["a dog!"]))
    _, _, preprocess = open_clip.create_model_and_transforms(name)
    with torch.no_grad():
        a = model.encode_image(preprocess(image)[None])[0].double().numpy()
        b = model.encode_text(open_clip.get_tokenizer(name)(["a dog!"]))[0].double().numpy()
    assert answer.values["score"][0] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-5)
    assert answer.values["text_tokens"] == [5]


def test_wrong_options_say_what_to_do(context: Context, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="positive multiple of 16"):
        ClipScore(compute_batch=20)
    with pytest.raises(ValueError, match="expected fp32 or bf16"):
        ClipScore(precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"give a weights file or one of its tags: .*openai"):
        ClipScore(model="ViT-L-14").weights(context)
    with pytest.raises(ValueError, match=r"neither a file .* nor a tag of ViT-L-14"):
        ClipScore(model="ViT-L-14", pretrained="opnai").weights(context)
    with pytest.raises(FileNotFoundError, match="were not found"):
        ClipScore(model="no-such-clip").weights(context)
    with pytest.raises(ValueError, match=r"no open_clip_config\.json"):
        ClipScore(model=".").weights(Context(models=(str(tmp_path),)))


def test_importing_the_stage_imports_neither_torch_nor_open_clip() -> None:
    heavy = "[name for name in ('torch', 'open_clip') if name in sys.modules]"
    code = f"import sys, stages.clip_score as c, stages.aesthetic; c.ClipScore().adds; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
