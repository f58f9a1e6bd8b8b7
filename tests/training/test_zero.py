"""DeepSpeed from a recipe: what is always written down, and that stages 0 to 3 in both precisions do the same."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.training.ranks import REPOSITORY
from training.recipe import RecipeError, load_recipe
from training.zero import deepspeed_config, estimate_memory

PARAMETERS = 591_747_872
MUON = {"muon_lr": 0.1, "gradient_clipping": 0}
MUON_CASES = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_always_written_down(stage: int) -> None:
    recipe = load_recipe({"zero_stage": stage, "precision": "bf16", "workers": 2})
    config = deepspeed_config(recipe, PARAMETERS, 2, "cuda:0")
    assert config["gradient_clipping"] == 0.1  # DeepSpeed's own default is 1.0
    assert config["zero_optimization"]["memory_efficient_linear"] is False
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 2 == 64
    assert config["data_types"]["grad_accum_dtype"] == ("fp32" if stage else "bf16")
    assert config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save", False) is (stage == 3)
    small = deepspeed_config(recipe, 1000, 2, "cpu")["zero_optimization"]
    assert small.get("reduce_bucket_size", 1000) == 1000
    assert small.get("overlap_comm", False) is False


def test_a_batch_that_does_not_divide_over_the_ranks() -> None:
    with pytest.raises(RecipeError, match="on 3 workers"):
        deepspeed_config(load_recipe({}), PARAMETERS, 3, "cpu")


def test_memory_follows_the_stages() -> None:
    """16 bytes a parameter with Adam in bf16, divided over the ranks as each stage does (no EMA, tiny batch)."""
    per_parameter = {}
    for stage in (0, 1, 2, 3):
        recipe = load_recipe({"zero_stage": stage, "ema_decay": 0, "batch": {"global_batch": 8, "micro_batch": 1}})
        memory = estimate_memory(recipe, PARAMETERS, 8, tokens=1, width=1, depth=1)
        per_parameter[stage] = (memory.total - memory.activations) / PARAMETERS
    # Stage 1 in bf16 accumulates in float32 beside the gradients: 4 bytes more.
    assert per_parameter == pytest.approx({0: 16, 1: 2 + 6 + 12 / 8, 2: 2 + 14 / 8, 3: 16 / 8}, rel=1e-6)


def steps_on_two_ranks(cases: list[tuple[int, str, str]]) -> dict[str, Any]:
    """What `_steps` saw, by "optimizer stage precision", on rank 0 of two."""
    store, out = tempfile.mktemp(prefix="zero-"), Path(tempfile.mkdtemp())
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, store, str(out), json.dumps(cases)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return json.loads((out / "seen.json").read_text())


def check_steps(seen: dict[str, Any]) -> None:
    """Losses agree between stages, a bad gradient moves nothing and leaves nothing, EMA goes out and in whole."""
    for case, found in seen.items():
        assert found["start"] == 0.0, f"{case}: the average does not start at the weights"
        assert found["loaded"], f"{case}: an average that was gathered and loaded is another one"
        assert found["untouched"], f"{case}: loading the average moved the weights"
        assert found["bad"] == {"applied": False, "moved": False}, case
        assert found["after"]["applied"], f"{case}: training does not go on after a bad step"
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 2e-3)):
        group = [found for case, found in seen.items() if case.endswith(precision)]
        for found in group:
            assert found["losses"] == pytest.approx(group[0]["losses"], rel=tolerance)
            assert found["norms"] == pytest.approx(group[0]["norms"], rel=max(tolerance, 1e-4))
            assert found["sum"] == pytest.approx(group[0]["sum"], rel=max(tolerance, 1e-4))


def test_steps_ema_and_bad_gradients() -> None:
    check_steps(steps_on_two_ranks([(2, "fp32", "adamw"), (2, "bf16", "adamw")]))


@pytest.mark.full
def test_steps_ema_and_bad_gradients_at_every_stage() -> None:
    cases = [(stage, precision, "adamw") for stage in range(4) for precision in ("fp32", "bf16")]
    check_steps(steps_on_two_ranks(cases))


def test_muon_makes_the_steps_of_pytorchs_own() -> None:
    """One process with torch.optim.Muon and AdamW side by side is the truth for two ranks under ZeRO."""
    _check_muon(steps_on_two_ranks([(2, "fp32", "muon"), (1, "bf16", "muon")]))


@pytest.mark.full
def test_muon_at_every_stage() -> None:
    _check_muon(steps_on_two_ranks([(stage, precision, "muon") for stage, precision in MUON_CASES]))


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "bf16")])
def test_muon_is_refused_where_its_updates_would_be_clipped(stage: int, precision: str) -> None:
    given = {"zero_stage": stage, "precision": precision, "optimizer": {"type": "muon", "gradient_clipping": 1.0}}
    with pytest.raises(RecipeError, match="gradient_clipping: 0"):
        deepspeed_config(load_recipe(given), PARAMETERS, 1, "cpu")


def _check_muon(seen: dict[str, Any]) -> None:
    truth = _muon_steps_of_torch()
    assert truth[0] - truth[-1] > 0.1  # the steps do something
    for case, found in seen.items():
        # Newton-Schulz runs in bf16 in both; rank sums round otherwise.
        assert found["losses"] == pytest.approx(truth, rel=1e-4 if "fp32" in case else 2e-3), case
        assert found["start"] == 0.0, case
        assert found["loaded"], case
        assert found["untouched"], case
        assert found["bad"] == {"applied": False, "moved": False}, case
        assert found["after"]["applied"], case


def _muon_steps_of_torch() -> list[float]:
    import torch

    from training.linear_dit import LinearDiT, LinearDiTConfig

    torch.manual_seed(0)
    model = LinearDiT(LinearDiTConfig.named("tiny", num_layers=1, caption_channels=64))
    torch.manual_seed(1)
    x = torch.randn(8, 48, 8, 8)
    matrices = [
        p
        for name, p in model.transformer_blocks.named_parameters()
        if p.ndim == 2 and not name.endswith("scale_shift_table")
    ]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=MUON["muon_lr"], weight_decay=0.0, momentum=0.95, adjust_lr_fn="original")
    adam = torch.optim.AdamW(others, lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(3):
        v = model(x, torch.full((8,), 500.0), torch.ones(8, 5, 64), torch.ones(8, 5))
        loss = (v - x).square().mean()
        loss.backward()
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _steps(stage: int, precision: str, optimizer: str, rank: int, workers: int) -> dict[str, Any]:
    import torch

    from training import zero
    from training.ema import Ema
    from training.linear_dit import LinearDiT, LinearDiTConfig

    recipe = load_recipe(
        {
            "zero_stage": stage,
            "precision": precision,
            "workers": workers,
            # Without clipping, which DeepSpeed applies to Muon's updates at some stages (refused: see above).
            "optimizer": {"type": optimizer, "lr": 1e-3} | MUON if optimizer == "muon" else {"lr": 1e-3},
            "batch": {"global_batch": 8, "micro_batch": 8 // workers},
        }
    )
    torch.manual_seed(0)
    model = LinearDiT(LinearDiTConfig.named("tiny", num_layers=1, caption_channels=64))
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = zero.open_engine(model, recipe, "cpu")
    ema = Ema(engine, 0.9)
    started = ema.gather(keep=True)
    torch.manual_seed(1)
    x = torch.randn(8, 48, 8, 8)[rank * 8 // workers : (rank + 1) * 8 // workers]

    def backward(factor: float = 1.0) -> float:
        n = len(x)
        v = engine(x, torch.full((n,), 500.0), torch.ones(n, 5, 64), torch.ones(n, 5))
        loss = (v.float() - x).square().mean() * factor
        engine.backward(loss)
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        return float(mean) / workers

    losses, norms = [], []
    for step in range(3):
        losses.append(backward())
        outcome = zero.step(engine, 1e-3)
        ema.update(step)
        norms.append(outcome.grad_norm)
        assert outcome.applied
    average = ema.gather(keep=True)
    weights = [master.detach().clone() for master in zero.masters(engine)]
    other = Ema(engine, 0.9)
    other.load(average)
    untouched = all(torch.equal(a, b) for a, b in zip(weights, zero.masters(engine), strict=True))
    backward(math.nan if rank == 0 else 1.0)
    bad = zero.step(engine, 1e-3)
    moved = not all(torch.equal(a, b) for a, b in zip(weights, zero.masters(engine), strict=True))
    backward()
    after = zero.step(engine, 1e-3)
    return {
        "start": max(float((started[name] - initial[name]).abs().max()) for name in initial),
        "losses": losses,
        "norms": norms,
        "sum": sum(float(value.double().abs().sum()) for value in average.values()),
        "loaded": all(torch.equal(a, b) for a, b in zip(ema.shards, other.shards, strict=True)),
        "untouched": untouched,
        "bad": {"applied": bad.applied, "moved": moved},
        "after": {"applied": after.applied},
    }


def main(store: str, out: str, cases: list[tuple[int, str]]) -> None:
    import torch
    import torch.distributed as dist

    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, workers), rank=rank, world_size=workers)
    seen = {
        f"{optimizer} {stage} {precision}": _steps(stage, precision, optimizer, rank, workers)
        for stage, precision, optimizer in cases
    }
    if rank == 0:
        (Path(out) / "seen.json").write_text(json.dumps(seen))
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
