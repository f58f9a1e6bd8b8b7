"""The one training loop. What differs between flow matching and each distillation method is an Objective.

    for every optimizer step:
        phase = objective.phase_at(step)
        for every micro-batch of this rank's slice of the global batch:
            draw = objective.draw(phase, batch, Randomness(seed, step, places in the global batch))
            loss = objective.loss(phase, networks, batch, draw);  backward
        step of the phase's engine at the rate of this step;  EMA
        now and then: a line of metrics, the loss on held-out rows, a checkpoint

Samples and random draws are functions of (seed, step, place in the global batch), so the losses do not depend on how
many workers share the work, and a run killed anywhere repeats the interrupted one from its last checkpoint on. The
state of a run is therefore: DeepSpeed's own, the averaged weights, and the number of steps done.

`run` is what every worker executes, under Ray Train, torchrun or alone. The process group must stand; no Ray in here.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.workers import WorkerContext
from pipelines.snapshot import open_snapshot
from stages.autoencoders import open_autoencoder
from stages.text_encoders import open_text_encoder
from training import checkpoint as ckpt
from training import zero
from training.captions import CaptionSampler
from training.data import Batches, Encoders, SnapshotSamples, slices_of_step, training_batches, validation_batches
from training.ema import Ema
from training.features import CachedFeatures
from training.linear_dit import LinearDiT, LinearDiTConfig, load_diffusers_folder
from training.objectives import Phase, Randomness, build_objective
from training.recipe import Recipe, numeric

SKIPS_IN_A_ROW = 20  # steps with gradients that are not finite after which a run gives up
SAY_EVERY_S = 5.0


class TrainingError(ValueError):
    """A run that cannot go on as it is; the message says what was seen and what to do."""


@dataclass(frozen=True)
class Job:
    """Everything a worker is told, as plain JSON values; all paths absolute.

    kind: "train" or "distill". snapshot, run: addresses. teacher: model folder of the teacher, for distillation.
    models: folders in which weights are looked up. token: of the attempt (checkpoint.Guard).
    """

    kind: str
    recipe: dict[str, Any]
    snapshot: str
    run: str
    run_id: str
    token: str
    teacher: str | None = None
    models: tuple[str, ...] = ()


def run(config: dict[str, Any], context: WorkerContext) -> None:
    """Train or distil to the recipe's last step, from the newest sound checkpoint if there is one. Collective."""
    job = Job(**{**config, "models": tuple(config.get("models", ()))})
    with contextlib.suppress(ckpt.SupersededError), _on_device(context.device):
        Training(job, context).run()


class Training:
    """One worker's part of one run, ready to go: engines, data and the point to continue from."""

    def __init__(self, job: Job, context: WorkerContext) -> None:
        self.job, self.context = job, context
        self.recipe = Recipe.model_validate(job.recipe)
        self.folder = Path(job.run)
        self.guard = ckpt.Guard(self.folder / "attempt.json", job.token)
        self.guard.check()
        self.ranks = ckpt.Ranks(context.rank, context.workers, _barrier(context), _gather(context))
        self.log = Log(self.folder, context.rank, self.guard)
        self.objective = build_objective(numeric(self.recipe.objective))
        self.teacher = ckpt.read_model(Path(job.teacher)) if job.teacher else None
        started = time.monotonic()

        self.autoencoder, self.text_encoder = open_encoders(self.recipe, self.teacher, job, context.device)
        self.resolution = int(self.teacher["resolution"]) if self.teacher else int(self.recipe.resolution or 0)
        self.batches, self.held_out = self._open_data()
        self.networks, self.config = self._build_networks()
        self.engines = {
            role: zero.open_engine(self.networks[role], self.recipe, context.device) for role in self.objective.trained
        }
        self.ema = Ema(self.engines[self.objective.result], self.recipe.ema_decay)
        self.encoders_folder = ckpt.keep_text_encoder(self.text_encoder, self.folder) if context.rank == 0 else None
        self.step, self.seconds = 0, 0.0
        self._resume()
        weights = self.networks[self.objective.result].parameters()
        size = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in weights)
        self.log.say(
            f"{self.objective.type}: {size:,} parameters, {context.workers} worker(s), ZeRO stage "
            f"{self.recipe.zero_stage}, {self.recipe.precision}; ready after {time.monotonic() - started:.1f} s"
        )

    # -- the loop

    def run(self) -> None:
        """From the current step to the last; the final model stands in RUN/model afterwards."""
        recipe, began, began_at = self.recipe, time.monotonic(), self.step
        before, skipped = self.seconds, 0
        last_said = 0.0
        self._training_mode()
        while self.step < recipe.steps:
            self.guard.check()
            step = self.step
            phase = self.objective.phase_at(step)
            loss, metrics, outcome = self._optimizer_step(step, phase)
            self.step = done = step + 1
            self.seconds = before + time.monotonic() - began

            skipped = 0 if outcome.applied else skipped + 1
            if done % recipe.log_every == 0 or done in (1, recipe.steps) or not outcome.applied:
                means = self._mean_over_ranks({"loss": loss, **metrics})
                line = self._line(done, means, outcome)
                if not outcome.applied:
                    line["bad_uids"] = self._bad_uids(step, loss)
                self.log.metrics(line)
                if time.monotonic() - last_said > SAY_EVERY_S or done == recipe.steps or not outcome.applied:
                    last_said = time.monotonic()
                    self.log.say(self._progress(line, (done - began_at) / (time.monotonic() - began)))
            if skipped >= SKIPS_IN_A_ROW:
                raise TrainingError(
                    f"{self.folder}: the gradients of {skipped} steps in a row, up to step {done}, were not finite: "
                    "lower optimizer.lr, or look at the samples named under bad_uids in metrics.jsonl"
                )
            if self.held_out is not None and (done % recipe.validate_every == 0 or done == recipe.steps):
                self._validate(done)
            if done % recipe.checkpoint_every == 0 or done == recipe.steps:
                self._save(done)
        if self.context.rank == 0:
            newest = ckpt.newest_sound(self.folder, self.log.say)
            assert newest is not None
            ckpt.publish(newest, self.folder)
            self.log.say(
                f"step {self.step:,}: finished in {_duration(self.seconds)}; the model is in {self.folder / 'model'}"
            )
        self.ranks.barrier()
        gc.unfreeze()

    def _optimizer_step(self, step: int, phase: Phase) -> tuple[Tensor, dict[str, Tensor], zero.StepOutcome]:
        """Loss and metrics of this rank's slice (means over its micro-batches), and whether the weights moved."""
        recipe, context = self.recipe, self.context
        (role,) = phase.trains
        engine = self.engines[role]
        networks = self._networks_for(phase)
        parts = self._slices(step)
        following = self._slices(step + 1)[0]
        total: dict[str, Tensor] = {}
        outcome = None
        for part, upcoming in zip(parts, [*parts[1:], following], strict=True):
            batch = self.batches.micro_batch(part, upcoming).to(context.device)
            draw = self.objective.draw(phase, batch, Randomness(recipe.seed, step, batch.position_B)).to(context.device)
            loss, metrics = self.objective.loss(phase, networks, batch, draw)
            engine.backward(loss)
            for name, value in {"loss": loss.detach(), **metrics}.items():
                total[name] = total.get(name, 0) + value / len(parts)
            if part is parts[-1]:
                outcome = zero.step(engine, recipe.optimizer.lr_at(step, recipe.steps))
            else:
                engine.step()  # counts the micro-batch; DeepSpeed moves the weights at the last one only
        assert outcome is not None
        if outcome.applied and role == self.objective.result:
            self.ema.update(step)
        self.objective.after_step(phase, networks, step)
        return total.pop("loss"), total, outcome

    def _slices(self, step: int) -> list[Any]:
        batch = self.recipe.batch
        return slices_of_step(step, batch.global_batch, batch.micro_batch, self.context.rank, self.context.workers)

    def _networks_for(self, phase: Phase) -> dict[str, Any]:
        """Engines that this phase trains; of the others the modules, without gradients of their own."""
        networks: dict[str, Any] = dict(self.networks)
        for role, engine in self.engines.items():
            trains = role in phase.trains
            if len(self.engines) > 1:
                engine.module.requires_grad_(trains)
            networks[role] = engine if trains else engine.module
        return networks

    def _training_mode(self) -> None:
        for engine in self.engines.values():
            engine.train()
        # What stands now stands to the end: the garbage collector need not walk it in every step.
        gc.collect()
        gc.freeze()

    # -- what a run says

    def _line(self, done: int, means: Mapping[str, float], outcome: zero.StepOutcome) -> dict[str, Any]:
        samples = done * self.recipe.batch.global_batch
        return {
            "step": done,
            "split": "train",
            **means,
            "lr": self.recipe.optimizer.lr_at(done - 1, self.recipe.steps),
            "grad_norm": outcome.grad_norm,
            "seconds": round(self.seconds, 3),
            "samples_seen": samples,
            "epoch": round(self.batches.epoch(samples), 4),
            **({} if outcome.applied else {"skipped": True}),
        }

    def _progress(self, line: Mapping[str, Any], steps_per_second: float) -> str:
        left = (self.recipe.steps - line["step"]) / steps_per_second
        skipped = "  SKIPPED: gradient not finite" if line.get("skipped") else ""
        return (
            f"step {line['step']:,}/{self.recipe.steps:,}  loss {line['loss']:.4f}  grad {line['grad_norm']:.3f}  "
            f"lr {line['lr']:.1e}  {steps_per_second:.2f} steps/s  "
            f"{steps_per_second * self.recipe.batch.global_batch:.0f} samples/s  {_duration(left)} left{skipped}"
        )

    def _mean_over_ranks(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        together = torch.stack([value.detach().double() for value in values.values()]).cpu()
        if self.context.workers > 1:
            _sum(together, self.context)
            together /= self.context.workers
        return dict(zip(values, together.tolist(), strict=True))

    def _bad_uids(self, step: int, loss: Tensor) -> list[str]:
        """Who was in the slices whose loss is not finite; all of the global batch where every loss is."""
        mine = [uid for part in self._slices(step) for uid in self.batches.uids(part)]
        parts = self.ranks.gather((math.isfinite(float(loss)), mine))
        bad = [uid for finite, uids in parts for uid in uids if not finite]
        return bad or [uid for _, uids in parts for uid in uids]

    @torch.no_grad()
    def _validate(self, done: int) -> None:
        """The objective's loss on held-out rows, always the same rows and draws, by the weights as they are."""
        assert self.held_out is not None
        phase = self.objective.phases[0]
        networks = self._networks_for(phase)
        started = time.monotonic()
        for engine in self.engines.values():
            engine.eval()
        sums: dict[str, Tensor] = {}
        for part, counts in validation_slices(self.held_out.samples, self.recipe.batch.micro_batch, self.context):
            batch = self.held_out.micro_batch(part).to(self.context.device)
            draw = self.objective.draw(phase, batch, Randomness(self.recipe.seed, 0, batch.position_B))
            loss, metrics = self.objective.loss(phase, networks, batch, draw.to(self.context.device))
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, torch.zeros(())) + value.detach().cpu() * (len(batch) if counts else 0)
        for engine in self.engines.values():
            engine.train()
        scale = self.context.workers / self.held_out.samples  # _mean_over_ranks divides by the workers again
        means = self._mean_over_ranks({name: value * scale for name, value in sums.items()})
        taken = round(time.monotonic() - started, 3)
        self.log.metrics(
            {
                "step": done,
                "split": "held_out",
                **means,
                "samples": self.held_out.samples,
                "seconds": round(self.seconds, 3),
            }
        )
        self.log.say(
            f"step {done:,}  held_out loss {means['loss']:.4f} over {self.held_out.samples} rows never trained on "
            f"({taken:.1f} s)"
        )

    # -- parts

    def _open_data(self) -> tuple[Batches, Batches | None]:
        recipe, context = self.recipe, self.context
        snapshot = open_snapshot(self.job.snapshot)
        samples, cached = SnapshotSamples(snapshot), None
        if recipe.features.latents or recipe.features.text:
            cached = CachedFeatures(snapshot, recipe.features.latents, recipe.features.text)
            cached.check(self.autoencoder, self.resolution, self.text_encoder)
        encoders = Encoders(self.autoencoder, self.text_encoder, self.resolution, context.device, cached)
        sampler = CaptionSampler(recipe.captions, recipe.seed) if recipe.captions else None
        shared: dict[str, Any] = {
            "cache_bytes": recipe.cache_bytes,
            "rank": context.rank,
            "workers": context.workers,
            "share": lambda tensor: _sum(tensor, context),
            "say": self.log.say,
        }
        return (
            training_batches(samples, encoders, seed=recipe.seed, sampler=sampler, **shared),
            validation_batches(samples, encoders, limit=recipe.validate_samples, **shared),
        )

    def _build_networks(self) -> tuple[dict[str, Any], LinearDiTConfig]:
        """Modules by role: trained ones in float32 for DeepSpeed to take over, frozen ones ready on the device."""
        low = torch.bfloat16 if self.recipe.precision == "bf16" else torch.float32
        networks: dict[str, Any] = {}
        for role in self.objective.frozen:
            frozen = load_diffusers_folder(Path(self.job.teacher or "") / "transformer")
            networks[role] = frozen.to(self.context.device, low).eval().requires_grad_(False)
        for role in self.objective.trained:
            torch.manual_seed(self.recipe.seed)
            if self.objective.starts_from.get(role) == "teacher":
                model = load_diffusers_folder(Path(self.job.teacher or "") / "transformer")
            else:
                shape = self.autoencoder.latent_shape(self.resolution, self.resolution)
                model = LinearDiT(model_config(self.recipe, shape, self.text_encoder.channels))
            networks[role] = model.checkpoint_activations(self.recipe.checkpoint_activations)
        return networks, networks[self.objective.result].config

    def _resume(self) -> None:
        """Continue from the newest sound checkpoint; every rank the same one."""
        self.log.open()
        found: list[str | None] = [None]
        if self.context.rank == 0:
            ckpt.sweep(self.folder)
            newest = ckpt.newest_sound(self.folder, self.log.say)
            found = [None if newest is None else str(newest)]
        # Whether a checkpoint is sound was looked at once; the others are told.
        chosen = self.ranks.gather(found[0])[0]
        if chosen is None:
            self.log.truncate(0)
            return
        source = Path(chosen)
        ckpt.refuse_mismatch(source, self.context.workers, self.recipe.zero_stage, self.recipe.precision)
        if self.recipe.ema_decay:
            self.ema.load(ckpt.load_weights(source))
        ckpt.load(source, self.engines)
        meta = ckpt.read_meta(source)
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
        self.log.truncate(self.step)
        self.log.say(f"continuing from {source.name}: {self.step:,} of {self.recipe.steps:,} steps are done")

    def _save(self, done: int) -> None:
        started = time.monotonic()
        result = self.engines[self.objective.result]

        def write_weights(folder: Path) -> None:
            weights = self.ema.gather(keep=self.context.rank == 0)
            if self.context.rank == 0:
                ckpt.write_model(folder, self.config, weights, self._described(done), self.encoders_folder)

        ckpt.save(
            self.folder,
            done,
            self.engines,
            write_weights,
            {
                "run_id": self.job.run_id,
                "kind_of_run": self.job.kind,
                "recipe_digest": self.recipe.digest(),
                "workers": self.context.workers,
                "zero_stage": self.recipe.zero_stage,
                "precision": self.recipe.precision,
                "batch": self.recipe.batch.model_dump(),
                "accumulation": result.gradient_accumulation_steps(),
                "sampler": {
                    "seed": self.recipe.seed,
                    "next_sample": done * self.recipe.batch.global_batch,
                    "epoch": self.batches.epoch(done * self.recipe.batch.global_batch),
                },
                "seconds": self.seconds,
                "versions": ckpt.versions(),
            },
            self.ranks,
            self.guard,
            self.recipe.keep_checkpoints,
        )
        self.log.say(f"step {done:,}  checkpoint written ({time.monotonic() - started:.1f} s)")

    def _described(self, done: int) -> dict[str, Any]:
        """model.json of the weights at this step."""
        sampling = self.objective.sampling()
        return {
            "kind": "student" if self.job.kind == "distill" else "teacher",
            "name": self.recipe.name,
            "method": self.objective.type,
            "sampling": sampling,
            "steps": sampling.get("steps"),
            "guidance_scale": sampling.get("guidance_scale"),
            "flow_shift": sampling.get("flow_shift"),
            "resolution": self.resolution,
            "autoencoder": self.autoencoder.describe(),
            "text_encoder": self.text_encoder.describe(),
            "trained_steps": done,
            "ema_decay": self.recipe.ema_decay,
            "lineage": {
                "run": self.job.run_id,
                "snapshot": self.batches.source.id,
                "teacher": self.teacher["digest"] if self.teacher else None,
            },
        }


# --- what a recipe describes -----------------------------------------------------------------------------------------


def open_encoders(recipe: Recipe, teacher: Mapping[str, Any] | None, job: Job, device: str) -> tuple[Any, Any]:
    """Autoencoder and text encoder: the teacher's where there is one, else the recipe's."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if teacher is not None and job.teacher is not None:
        places = (job.teacher, *job.models)
        return (
            open_autoencoder(teacher["autoencoder"], models=places, device=device),
            open_text_encoder(teacher["text_encoder"], models=places, device=device),
        )
    return (
        open_autoencoder(numeric(recipe.autoencoder), models=job.models, device=device),
        open_text_encoder(numeric(recipe.text_encoder), models=job.models, device=device),
    )


def model_config(recipe: Recipe, latent_shape: tuple[int, int, int], caption_channels: int) -> LinearDiTConfig:
    """The model that a recipe describes, its ends fitted to autoencoder and text encoder unless it says otherwise.

    Raises TrainingError for an unknown field, and where a width that is written down does not fit.
    """
    import difflib

    given = dict(numeric(recipe.model or {}))
    size = given.pop("size", None)
    known = list(LinearDiTConfig.__dataclass_fields__)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, ["size", *known], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are size, {', '.join(known)}"
            raise TrainingError(f"model.{name} is not an option; {hint}")
    if size is None and "num_layers" not in given:
        raise TrainingError("model.size is missing: write a published size such as 0.6B, or tiny")
    channels, _, side = latent_shape
    fitted = {
        "in_channels": channels,
        "out_channels": channels,
        "sample_size": side,
        "caption_channels": caption_channels,
    }
    for name in ("in_channels", "caption_channels"):
        if given.get(name, fitted[name]) != fitted[name]:
            whose = "autoencoder" if name == "in_channels" else "text encoder"
            raise TrainingError(
                f"model.{name} is {given[name]}, but the {whose} gives {fitted[name]}: leave the line out, or name the "
                f"{whose} that it was meant for"
            )
    options = {**fitted, **given}
    return LinearDiTConfig(**options) if size is None else LinearDiTConfig.named(str(size), **options)


def validation_slices(samples: int, micro_batch: int, context: WorkerContext) -> Iterator[tuple[Any, bool]]:
    """(slice, whether it counts) for this rank. All ranks get as many: a forward pass is collective at ZeRO stage 3."""
    from training.data import Slice

    starts = range(0, samples, micro_batch)
    for first in range(0, len(starts), context.workers):
        number = first + context.rank
        start = starts[number] if number < len(starts) else 0
        places = range(start, min(start + micro_batch, samples))
        yield Slice(places, places), number < len(starts)


# --- what a run writes -----------------------------------------------------------------------------------------------


class Log:
    """metrics.jsonl and log.txt of a run, written by rank 0 and followed by the driver."""

    def __init__(self, folder: Path, rank: int, guard: ckpt.Guard) -> None:
        self.folder, self.writes, self.guard = folder, rank == 0, guard
        self.path = folder / "metrics.jsonl"

    def open(self) -> None:
        if self.writes:
            self.path.touch()

    def truncate(self, step: int) -> None:
        """Forget what was logged after `step`: those steps are done again. A line cut off by a kill goes too."""
        if not self.writes:
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                continue
        aside = self.path.with_name(".metrics.jsonl.tmp")
        aside.write_text("".join(kept), encoding="utf-8")
        os.replace(aside, self.path)

    def metrics(self, line: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        self.guard.check()
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
        }
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(plain) + "\n")

    def say(self, text: str) -> None:
        if self.writes:
            with open(self.folder / "log.txt", "a", encoding="utf-8") as stream:
                stream.write(text + "\n")


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


# --- ranks and devices -----------------------------------------------------------------------------------------------

_host_group: Any = None


def _host(context: WorkerContext) -> Any:
    """A group that moves CPU tensors: the default one on CPUs, a gloo group beside NCCL."""
    global _host_group
    if not context.device.startswith("cuda"):
        return None
    if _host_group is None:
        _host_group = dist.new_group(backend="gloo")
    return _host_group


def _sum(tensor: Tensor, context: WorkerContext) -> Tensor:
    if context.workers > 1:
        dist.all_reduce(tensor, group=_host(context))
    return tensor


def _barrier(context: WorkerContext) -> Any:
    return lambda: dist.barrier(group=_host(context)) if context.workers > 1 else None


def _gather(context: WorkerContext) -> Any:
    def gather(value: Any) -> list[Any]:
        if context.workers == 1:
            return [value]
        parts: list[Any] = [None] * context.workers
        dist.all_gather_object(parts, value, group=_host(context))
        return parts

    return gather


@contextlib.contextmanager
def _on_device(device: str) -> Iterator[None]:
    global _host_group
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    try:
        yield
    finally:
        _host_group = None
