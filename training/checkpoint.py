"""What a run leaves on disk, so that it can be continued to the last bit and its model drawn from.

    RUN/
      run.json                       who this run is: id, kind, recipe, snapshot, teacher, versions
      attempt.json                   the token of the process group that may write here now
      metrics.jsonl, log.txt         one JSON a logged step; what rank 0 said
      checkpoints/step-000500/       complete as soon as it is there: written aside, flushed, renamed
        state/<role>/                DeepSpeed's own files, one a rank
        model/                       the averaged weights at that step, a folder like RUN/model
        meta.json                    step, sampler, ranks, stage, recipe digest, versions, and a digest of every file
      model/                         the last step's model: self-contained, in diffusers' format
        transformer/{config.json, diffusion_pytorch_model.safetensors}
        text_encoder/                the small text encoder's own files (a large one is named by digest instead)
        model.json

RUN must lie on a file system that every worker sees. A checkpoint is continued with as many workers, the ZeRO stage and
the precision it was written with; anything else is refused with what to do.

DeepSpeed's state is a pickle: only checkpoints that one wrote oneself should be continued. Models are safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata as packages
from pathlib import Path
from typing import Any

from stages.contract import digest_of, weights_digest

SCHEMA_VERSION = "1.0"
COPIED_ENCODER_BYTES = 500_000_000  # text encoders up to this size travel with the model
VERSIONS_OF = ("sluice", "torch", "deepspeed", "ray", "transformers", "diffusers", "numpy")


class CheckpointError(ValueError):
    """A checkpoint or model folder that cannot be used; the message says which and what to do."""


class SupersededError(RuntimeError):
    """Another process group writes to this run now: this one, left over from a killed driver, ends."""


# --- small things ----------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole: a reader sees the old one or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)


def versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS_OF:
        try:
            found[name] = packages.version(name)
        except packages.PackageNotFoundError:
            continue
    return found


def _digest_and_flush(path: Path) -> tuple[str, int]:
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        os.fsync(stream.fileno())
        return digest, os.fstat(stream.fileno()).st_size


@dataclass(frozen=True)
class Guard:
    """Lets a worker notice that its driver is dead and another attempt has begun: it must not write any more."""

    path: Path
    token: str

    @classmethod
    def begin(cls, run: Path, token: str) -> Guard:
        """Make `token` the one that may write. Workers of every earlier attempt end at their next step."""
        write_json(run / "attempt.json", {"token": token, "pid": os.getpid(), "started": time.time()})
        return cls(run / "attempt.json", token)

    def check(self) -> None:
        if json.loads(self.path.read_text())["token"] != self.token:
            raise SupersededError(f"{self.path.parent}: another attempt of this run has begun; this worker ends")


# --- finding ---------------------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path.parent for path in (run / "checkpoints").glob("step-*/meta.json")]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def read_meta(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "meta.json").read_text(encoding="utf-8"))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None where all have the digests that meta.json names."""
    for name, expected in read_meta(checkpoint)["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size_bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {expected['size_bytes']}"
        if _digest_and_flush(path)[0] != expected["sha256"]:
            return f"{name} was changed since it was written"
    return None


def newest_sound(run: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose every file is as it was written; damaged ones are named and passed over."""
    for checkpoint in reversed(checkpoints(run)):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint
        say(f"checkpoint {checkpoint.name} is damaged ({wrong}): going back to the one before it")
    return None


def find_model(address: str | Path) -> Path:
    """The model folder that CKPT means: RUN (its model/, else its newest checkpoint's), RUN/checkpoints/step-N or a
    model.

    Raises CheckpointError saying what was looked for.
    """
    folder = Path(address).expanduser().absolute()
    tried = [folder, folder / "model", *(path / "model" for path in reversed(checkpoints(folder)))]
    for candidate in tried:
        if (candidate / "model.json").is_file():
            return candidate
    raise CheckpointError(
        f"{folder}: there is no model here: pass the folder of a run that has reached a checkpoint, "
        "RUN/checkpoints/step-N, or a model folder with a model.json"
    )


def read_model(folder: Path) -> dict[str, Any]:
    """model.json. Raises CheckpointError for another major version of the format."""
    described = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    if str(described.get("schema_version", "?")).split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise CheckpointError(
            f"{folder / 'model.json'}: schema version {described.get('schema_version')!r}, this version reads "
            f"{SCHEMA_VERSION}: use the Sluice that wrote it, or train again"
        )
    return described


# --- models ----------------------------------------------------------------------------------------------------------


def keep_text_encoder(encoder: Any, run: Path) -> Path | None:
    """Copy a small text encoder's files into RUN once, for every model of the run to link to; None for a large one."""
    source = Path(encoder.folder)
    outside = source.parent / "tokenizer"
    inside = [path for path in source.rglob("*") if path.is_file()]
    beside = [] if (source / "tokenizer_config.json").exists() or not outside.is_dir() else list(outside.iterdir())
    if sum(path.stat().st_size for path in (*inside, *beside)) > COPIED_ENCODER_BYTES:
        return None
    kept = run / "encoders"
    if not kept.exists():
        aside = run / f".encoders.{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(source, aside / source.name)
        if beside:
            shutil.copytree(outside, aside / "tokenizer")
        os.replace(aside, kept)
    return kept


def write_model(
    folder: Path, config: Any, weights: Mapping[str, Any], described: Mapping[str, Any], encoders: Path | None
) -> str:
    """Write a model folder and return its digest, which covers everything that decides what it draws.

    described: model.json's fields but digest and schema_version. encoders: what `keep_text_encoder` returned.
    """
    from training.linear_dit import save_diffusers_folder

    save_diffusers_folder(folder / "transformer", config, dict(weights))
    if encoders is not None:
        for source in sorted(path for path in encoders.rglob("*") if path.is_file()):
            target = folder / source.relative_to(encoders)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source, target)
    written = sorted((folder / "transformer").iterdir())
    digest = digest_of(
        "model",
        weights_digest((path.name, _digest_and_flush(path)[0]) for path in written),
        {key: described[key] for key in ("kind", "method", "sampling", "resolution", "text_encoder", "autoencoder")},
    )
    write_json(folder / "model.json", {"schema_version": SCHEMA_VERSION, "digest": digest, **described})
    return digest


def publish(checkpoint: Path, run: Path) -> Path:
    """Make RUN/model the model of `checkpoint` (hard links where the disk has them), in one move."""
    aside = run / f".model.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(checkpoint / "model", aside, copy_function=_link_or_copy)
    shutil.rmtree(run / "model", ignore_errors=True)
    os.replace(aside, run / "model")
    return run / "model"


def _link_or_copy(source: Any, target: Any) -> Any:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


# --- saving and loading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """This rank's place, and how ranks wait for and tell each other (torch.distributed, or nothing for one)."""

    rank: int
    workers: int
    barrier: Callable[[], None]
    gather: Callable[[Any], list[Any]]


def save(
    run: Path,
    step: int,
    engines: Mapping[str, Any],
    write_weights: Callable[[Path], None],
    meta: Mapping[str, Any],
    ranks: Ranks,
    guard: Guard,
    keep: int,
) -> Path:
    """Write checkpoints/step-NNNNNN. Collective. write_weights(folder) writes model/ and is called on every rank."""
    final = run / "checkpoints" / f"step-{step:06d}"
    aside = final.with_name(f".{final.name}.{guard.token[:8]}")
    if ranks.rank == 0:
        guard.check()
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "state").mkdir(parents=True)
    ranks.barrier()
    for role, engine in engines.items():
        engine.save_checkpoint(str(aside / "state"), tag=role, save_latest=False, exclude_frozen_parameters=True)
    write_weights(aside / "model")
    ranks.barrier()
    # Digests are shared out over the ranks: at 1.6B parameters there are 25 GB of them.
    names = sorted(str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file())
    mine = {name: _digest_and_flush(aside / name) for name in names[ranks.rank :: ranks.workers]}
    files = {name: found for part in ranks.gather(mine) for name, found in part.items()}
    if ranks.rank == 0:
        described = {name: {"sha256": digest, "size_bytes": size} for name, (digest, size) in sorted(files.items())}
        digest = weights_digest((name, digest) for name, (digest, _) in files.items())
        write_json(
            aside / "meta.json",
            {
                "schema_version": SCHEMA_VERSION,
                "kind": "checkpoint",
                "digest": digest,
                "step": step,
                **meta,
                "files": described,
            },
        )
        guard.check()
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _flush_folder(final.parent)
        for old in checkpoints(run)[:-keep] if keep else ():
            shutil.rmtree(old)
    ranks.barrier()
    return final


def load(checkpoint: Path, engines: Mapping[str, Any]) -> None:
    """Bring engines back to where they were saved. Collective. `refuse_mismatch` has been asked before."""
    for role, engine in engines.items():
        loaded, _ = engine.load_checkpoint(
            str(checkpoint / "state"), tag=role, load_lr_scheduler_states=False, load_optimizer_states=True
        )
        if loaded is None:
            raise CheckpointError(
                f"{checkpoint}: DeepSpeed found no state of {role!r} in it: delete the folder and go on"
            )


def load_weights(checkpoint: Path) -> dict[str, Any]:
    """The averaged weights of a checkpoint by name, whole, float32."""
    from safetensors.torch import load_file

    return load_file(checkpoint / "model" / "transformer" / "diffusion_pytorch_model.safetensors")


def refuse_mismatch(checkpoint: Path, workers: int, zero_stage: int, precision: str) -> None:
    """Raise CheckpointError unless a run of this shape can continue the checkpoint."""
    meta = read_meta(checkpoint)
    for name, wanted in (("workers", workers), ("zero_stage", zero_stage), ("precision", precision)):
        if meta[name] != wanted:
            raise CheckpointError(
                f"{checkpoint}: it was written with {name} {meta[name]}, this run has {name} {wanted}: continue with "
                f"--set {name}={meta[name]}, or begin a new run with another --output"
            )


def sweep(run: Path) -> None:
    """Remove what killed attempts left half-written."""
    for path in [*run.glob(".model.*"), *run.glob(".encoders.*"), *(run / "checkpoints").glob(".step-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
