"""An exponential moving average of the weights, kept where the optimizer keeps its float32 masters.

    p_ema ← r·p_ema + (1 − r)·p,        r(n) = min(decay, (1 + n) / (10 + n))

The average is taken of the masters, never of bf16 weights: at r = 0.9999 an update is below bf16's resolution and the
average would stand still. Each rank averages only its own partition, so at ZeRO stages 1 to 3 it costs 4 bytes a
parameter divided by the ranks, and no communication. Whole tensors are put together only to be saved or published, and
that is also the form in which a checkpoint holds them: names and shapes of the model, whatever the stage and the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from training import zero


class Ema:
    """The average of one engine's weights. decay 0 follows the weights themselves: nothing is stored then."""

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.shards: list[Tensor] = [master.detach().clone() for master in zero.masters(engine)] if decay else []

    def rate(self, step: int) -> float:
        """r of the update after optimizer step `step` (from 0). The ramp lets early weights go quickly."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        if self.shards:
            torch._foreach_lerp_(self.shards, [m.detach() for m in zero.masters(self.engine)], 1 - self.rate(step))

    @contextmanager
    def _in_place_of_masters(self) -> Iterator[None]:
        """Masters and average exchanged, so that DeepSpeed's own gathering of masters puts the average together."""
        masters = [master.data for master in zero.masters(self.engine)] if self.shards else []
        kept = [master.clone() for master in masters]
        for master, shard in zip(masters, self.shards, strict=True):
            master.copy_(shard)
        try:
            yield
        finally:
            for master, value in zip(masters, kept, strict=True):
                master.copy_(value)

    @torch.no_grad()
    def gather(self, keep: bool) -> dict[str, Tensor]:
        """The averaged weights by name, float32 on the CPU. Collective; ranks with keep=False get {}."""
        state: dict[str, Tensor] = {}
        with self._in_place_of_masters():
            for name, parameter in self.engine.module.named_parameters():
                whole = zero.full_master(self.engine, parameter)
                if keep:
                    state[name] = whole.detach().to("cpu", torch.float32, copy=True)
        return state

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the average from whole tensors. The masters are left as they were."""
        if not self.shards:
            return
        masters = [master.data for master in zero.masters(self.engine)]
        kept = [master.clone() for master in masters]
        for name, parameter in self.engine.module.named_parameters():
            zero.set_full_master(self.engine, parameter, state[name].to(masters[0].device))
        for shard, master, value in zip(self.shards, masters, kept, strict=True):
            shard.copy_(master)
            master.copy_(value)
