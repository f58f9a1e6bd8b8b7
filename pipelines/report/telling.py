"""What CLIP can tell apart: how often a caption outscores wrong ones, by kind of wrong, asked of `caption_probe`.

An AUC near 1 on whole captions says nothing about attributes and relations: a score that cannot tell "left of" from
"right of" cannot filter captions that have them the wrong way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.lineage.ledger import Ledger, quoted

KINDS = {
    "swapped": "another row's caption",
    "attributes": "two attributes exchanged",
    "relation": "the relation reversed",
}
MOST_ROWS = 50_000


@dataclass(frozen=True)
class Telling:
    """One kind of wrong caption. auc: Mann-Whitney; paired: share of pairs in which the right one scores higher."""

    stage: str
    kind: str
    pairs: int
    auc: float
    paired: float


def auc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """The Mann-Whitney probability that a value of `higher` exceeds one of `lower`, ties counted half."""
    from scipy.stats import rankdata

    if not len(higher) or not len(lower):
        return float("nan")
    ranks = rankdata(np.concatenate([higher, lower]))
    return float((ranks[: len(higher)].sum() - len(higher) * (len(higher) + 1) / 2) / (len(higher) * len(lower)))


def telling_apart(ledger: Ledger) -> list[Telling]:
    """Every probe of this ledger, each kind with a pair or more; of many rows the first MOST_ROWS by uid."""
    found = []
    stages = ledger.manifest.get("recipe", {}).get("stages", {})
    for name in (name for name, stage in stages.items() if stage.get("type") == "caption_probe"):
        for kind in KINDS:
            right, wrong = quoted(f"{name}.caption"), quoted(f"{name}.{kind}")
            if f"{name}.{kind}" not in ledger.columns:
                continue
            rows = ledger.rows(
                f"SELECT {right} AS higher, {wrong} AS lower FROM ledger "
                f'WHERE {right} IS NOT NULL AND {wrong} IS NOT NULL ORDER BY uid, shard, "index" LIMIT {MOST_ROWS}'
            )
            if rows:
                higher, lower = ([row[side] for row in rows] for side in ("higher", "lower"))
                paired = float(np.mean([(a > b) + 0.5 * (a == b) for a, b in zip(higher, lower, strict=True)]))
                found.append(Telling(name, KINDS[kind], len(rows), auc(higher, lower), paired))
    return found
