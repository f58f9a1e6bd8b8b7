"""DeepSpeed from a recipe: its JSON is derived here and nowhere else, so nobody maintains a second schema.

    engine = open_engine(model, recipe, device)           # collective: every rank calls it
    engine.backward(loss); step(engine)

What is decided once for every run:
  - `gradient_clipping` is always written down, because DeepSpeed's own default is 1.0 and not "off";
  - `memory_efficient_linear` is false: it replaces F.linear for the whole process, which forward-mode differentiation
    (consistency distillation) does not survive;
  - buckets are never larger than the model. DeepSpeed allocates them anew in every step, and its default of 5e8
    elements costs a small model more than the step itself;
  - gradients are accumulated in float32 wherever DeepSpeed can, that is in all cases but stage 0 with bf16;
  - AdamW is PyTorch's fused one, which needs no compiled DeepSpeed op and is on ZeRO's tested list; Muon is DeepSpeed's
    own, the only one that knows how ZeRO cuts matrices up.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.recipe import OptimizerOptions, Recipe, RecipeError

if TYPE_CHECKING:
    import torch

BUCKET = 500_000_000  # elements; DeepSpeed's own default
PREFETCH = 50_000_000
PERSISTENT = 100_000  # stage 3 keeps smaller parameters whole on every rank: gathering them costs more than they weigh


def deepspeed_config(recipe: Recipe, parameters: int, workers: int, device: str) -> dict[str, Any]:
    """DeepSpeed's configuration for a model of `parameters` weights on `workers` ranks.

    Raises RecipeError where the global batch does not divide, and where gradient clipping would clip Muon's updates.
    """
    _refuse_clipped_muon(recipe)
    cuda = device.startswith("cuda")
    zero: dict[str, Any] = {"stage": recipe.zero_stage, "memory_efficient_linear": False}
    if recipe.zero_stage:
        bucket = min(BUCKET, parameters)
        zero |= {
            "contiguous_gradients": True,
            "overlap_comm": cuda,  # on a CPU the second stream is this very thread
            # At stage 3 DeepSpeed's Muon wants whole gradients.
            "reduce_scatter": recipe.zero_stage < 3 or recipe.optimizer.type != "muon",
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        }
    if recipe.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": min(PREFETCH, parameters),
            "stage3_param_persistence_threshold": PERSISTENT,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    bf16 = recipe.precision == "bf16"
    return {
        "train_micro_batch_size_per_gpu": recipe.batch.micro_batch,
        "gradient_accumulation_steps": recipe.accumulation(workers),
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "bf16" if bf16 and recipe.zero_stage == 0 else "fp32"},
        "zero_optimization": zero,
        "steps_per_print": 10**9,  # the loop reports progress itself
        "wall_clock_breakdown": False,
    }


def _refuse_clipped_muon(recipe: Recipe) -> None:
    """DeepSpeed (0.19.8) orthogonalises before it clips, but for stage 0 and for stage 1 in bf16: measured on the tiny
    model, the norm it clips by is 13.5 where the gradients' is 1.3."""
    clips_gradients = recipe.zero_stage == 0 or (recipe.zero_stage == 1 and recipe.precision == "bf16")
    if recipe.optimizer.type == "muon" and recipe.optimizer.gradient_clipping and not clips_gradients:
        raise RecipeError(
            f"optimizer: at zero_stage {recipe.zero_stage} in {recipe.precision} DeepSpeed would clip Muon's updates "
            "instead of its gradients: write gradient_clipping: 0 (Muon's steps do not grow with gradients), or "
            "zero_stage: 1 with precision: bf16"
        )


def prepare_deepspeed(device: str) -> Any:
    """Import DeepSpeed for this device, quietly. Before any engine is opened, in every worker."""
    cuda = device.startswith("cuda")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    # Warnings at import time: a missing CUDA compiler, the accelerator just chosen. Set again afterwards, because
    # DeepSpeed gives its logger a level of its own.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not cuda:
        # Muon's kernels are decorated with torch.compile, which on a CPU needs a C++ compiler that may not be there.
        importlib.import_module("torch._dynamo").config.disable = True
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not cuda:
        # A C++ extension that speeds up inference collectives only. Compiling it would hold every first run up by
        # half a minute, and a run killed meanwhile leaves a lock file on which all later ones wait for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def open_engine(model: torch.nn.Module, recipe: Recipe, device: str) -> Any:
    """A DeepSpeed engine with its optimizer around `model`. Collective; the process group must stand.

    Raises RecipeError where the global batch does not divide by the ranks.
    """
    import torch.distributed as dist

    deepspeed = prepare_deepspeed(device)
    optimizer = open_optimizer(model, recipe.optimizer)
    config = deepspeed_config(
        recipe, sum(parameter.numel() for parameter in model.parameters()), dist.get_world_size(), device
    )
    exact = {name: p.detach().clone() for name, p in model.named_parameters()} if recipe.precision == "bf16" else {}
    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # stage 1 in bf16 prints the machine's memory, whatever the log level
        engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
    if hasattr(engine.optimizer, "fp32_groups"):
        # Stage 0 with bf16 lets AdamW make a step on zeros to have its states: undo it, or the first updates are
        # halved.
        for state in engine.optimizer.optimizer.state.values():
            state["step"].zero_()
    # DeepSpeed takes its masters from the weights it has rounded already; give them back what rounding lost.
    for name, parameter in engine.module.named_parameters():
        if name in exact:
            set_full_master(engine, parameter, exact[name].to(engine.device))
    return engine


def open_optimizer(model: torch.nn.Module, options: OptimizerOptions) -> torch.optim.Optimizer:
    """The optimizer that a recipe names, over what of `model` is trained; DeepSpeed must have been imported.

    Muon's groups keep how their rate stands to the recipe's `lr` under "lr_ratio" (see `step`). Its Newton-Schulz
    iteration runs in bf16, as its authors have it.
    """
    import torch

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adam: dict[str, Any] = {"betas": options.betas, "eps": options.eps, "weight_decay": options.weight_decay}
    if options.type == "adamw":
        return torch.optim.AdamW(list(trained.values()), lr=options.lr, fused=True, **adam)

    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    # Matrices of the blocks; convolutions, tables, embedders and the output layer stay with Adam.
    turned = {
        name
        for name, p in trained.items()
        if p.ndim == 2 and "transformer_blocks." in name and not name.endswith("_table")
    }
    for name, parameter in trained.items():
        parameter.use_muon = name in turned  # type: ignore[attr-defined]  # ZeRO's partitions look for this mark
    matrices = [parameter for name, parameter in trained.items() if name in turned]
    others = [parameter for name, parameter in trained.items() if name not in turned]
    return MuonWithAuxAdam(
        [
            {
                "params": matrices,
                "use_muon": True,
                "lr": options.muon_lr,
                "lr_ratio": options.muon_lr / options.lr,
                "momentum": options.muon_momentum,
                "weight_decay": options.weight_decay,
                "ns_method": "standard",
            },
            {"params": others, "use_muon": False, "lr": options.lr, **adam},
        ],
        adam_optimizer=torch.optim.AdamW,
        adam_optimizer_kwargs={"fused": True},
    )


@dataclass(frozen=True)
class StepOutcome:
    """applied: whether the weights moved. grad_norm: global norm before clipping, NaN where it is not finite."""

    applied: bool
    grad_norm: float


def step(engine: Any, lr: float) -> StepOutcome:
    """One optimizer step at rate `lr` (a group's own rate follows it by its ratio).

    Skipped, with the gradients dropped, where a gradient is not finite.
    """
    import torch

    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        return _plain_step(engine)
    engine.step()
    norm = engine.get_global_grad_norm()
    norm = math.nan if norm is None else float(norm)
    applied = not engine.optimizer.overflow
    return StepOutcome(applied, norm if applied and math.isfinite(norm) else math.nan)


def _plain_step(engine: Any) -> StepOutcome:
    """Stage 0 in fp32 is a bare AdamW: nobody in DeepSpeed looks at its gradients, so it is done here.

    They are reduced already, so every rank sees the same. A bad step still goes through the engine, which counts and
    clears, but with nothing for the optimizer to move (zero gradients would still move weights by momentum).
    """
    import torch

    norm = float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))
    if math.isfinite(norm):
        engine.step()
        return StepOutcome(True, norm)
    held = [group["params"] for group in engine.optimizer.param_groups]
    for group in engine.optimizer.param_groups:
        group["params"] = []
    engine.step()
    for group, parameters in zip(engine.optimizer.param_groups, held, strict=True):
        group["params"] = parameters
    return StepOutcome(False, math.nan)


def masters(engine: Any) -> list[torch.Tensor]:
    """This rank's float32 weights, the ones that the optimizer moves: all of them at stage 0, else its partition."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        return list(optimizer.fp32_partitioned_groups_flat)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # stages 1 and 2
        return list(optimizer.single_partition_of_fp32_groups)
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # stage 1, bf16 weights and fp32 accumulation
        return list(optimizer.fp32_groups_flat_partition)
    if hasattr(optimizer, "fp32_groups"):  # stage 0, bf16
        return [master for group in optimizer.fp32_groups for master in group]
    return list(engine.module.parameters())


def full_master(engine: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole float32 master of one parameter, on every rank. Collective at stages 1 to 3."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = _unpartitioned_master(engine, parameter)
    return safe_get_full_fp32_param(parameter) if whole is None else whole


def set_full_master(engine: Any, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Write one parameter's float32 master from its whole value; each rank keeps what it owns."""
    from deepspeed.utils import safe_set_full_fp32_param

    whole = _unpartitioned_master(engine, parameter)
    if whole is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        whole.data.copy_(value)


def _unpartitioned_master(engine: Any, parameter: torch.nn.Parameter) -> torch.Tensor | None:
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() != 0:
        return None
    if not hasattr(optimizer, "fp32_groups"):
        return parameter
    for low_group, group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for low, master in zip(low_group, group, strict=True):
            if low is parameter:
                return master
    raise AssertionError("a parameter that no optimizer group holds")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a rank, by what they are for. Activations are an estimate (see `estimate_memory`), the rest is counted."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    frozen: int
    activations: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def estimate_memory(
    recipe: Recipe, parameters: int, workers: int, *, tokens: int, width: int, depth: int, frozen_parameters: int = 0
) -> MemoryEstimate:
    """What one rank holds while training. tokens: image tokens a sample; frozen_parameters: of teachers, one copy a
    rank.

    Activations are ACTIVATION_WIDTHS values of the model's width for each token and block, measured on the tiny model
    (text tokens, which weigh little beside 1024 image tokens, are not counted).
    """
    stage, low = recipe.zero_stage, 2 if recipe.precision == "bf16" else 4
    share = [
        1 if stage < needed else workers for needed in (1, 2, 3)
    ]  # how many ranks split optimizer, gradients, weights
    master = 8 if low == 4 and stage == 0 else 12  # ZeRO keeps masters of its own, also in fp32
    gradient = low + 4 if low == 2 and stage == 1 else low  # that optimizer also accumulates in float32, unpartitioned
    values = recipe.batch.micro_batch * tokens * width
    every = recipe.checkpoint_activations
    kept_blocks = depth if not every else depth - math.ceil(depth / every) + 1
    return MemoryEstimate(
        weights=parameters * low // share[2],
        gradients=parameters * gradient // share[1],
        optimizer=parameters * master // share[0],
        ema=0 if recipe.ema_decay == 0 else parameters * 4 // share[0],
        frozen=frozen_parameters * low,
        activations=values * low * (ACTIVATION_WIDTHS * kept_blocks + (math.ceil(depth / every) if every else 0)),
    )


ACTIVATION_WIDTHS = 46
