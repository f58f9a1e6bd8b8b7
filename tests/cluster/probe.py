"""Functions that the tests here run on training workers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from cluster.workers import WorkerContext


def meet(config: dict[str, Any], context: WorkerContext) -> None:
    """Write down who I am and what the group sums to; fail as the config says."""
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(context.rank + 1)])
    dist.all_reduce(total)
    folder = Path(config["folder"])
    attempts = folder / f"attempts-{context.rank}"
    attempts.write_text(str(int(attempts.read_text()) + 1 if attempts.exists() else 1))
    if config.get("mistake") == context.rank:
        raise ValueError("lr is -1: write a rate above 0")
    if config.get("breaks") == context.rank and attempts.read_text() == "1":
        raise RuntimeError("a worker died")
    import stages.contract
    import training.loop

    seen = {
        "rank": context.rank,
        "workers": context.workers,
        "device": context.device,
        "sum": total.item(),
        "threads": os.environ["OMP_NUM_THREADS"],
        "accelerator": os.environ["DS_ACCELERATOR"],
        "modules": [stages.contract.__file__, training.loop.__file__],
        "path": sys.path[:4],
    }
    (folder / f"rank-{context.rank}.json").write_text(json.dumps(seen))
    context.report({"sum": total.item()})
