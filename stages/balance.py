"""Balancing by concept: clusters of CLIP embeddings, of which none may hold more than its share.

    rules:
      balance: {type: balance, embedding: clip.image_embedding, clusters: 1000, max_share: 0.005}
      softer:  {type: balance, embedding: clip.image_embedding, clusters: 1000, temperature: 2, by: clip.score}

Rows alive at this step are clustered by spherical k-means (faiss, seeded, one thread: the same whatever the order of
rows and the number of workers). `max_share` caps each cluster at that share of the rows alive. `temperature` T >= 1
shrinks a cluster of n rows to m (n/m)^(1/T), where m is the mean size: smaller ones are kept whole, T = 1 changes
nothing, and with growing T large clusters approach the mean. Of a cluster that has too many, the rows with the highest
`by` stay; without `by`, those that a seeded hash of the image picks.

Every row's cluster is recorded as `<rule>.cluster`. The manifest's cut tells the effective number of clusters,
exp(entropy of their shares), before and after.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from stages.contract import Column
from stages.rules import Rule, Table, Verdicts, occurrence_order

ITERATIONS = 25
# Rows that centroids are fitted on, for each cluster, and rows assigned at a time.
FIT_ROWS_PER_CLUSTER = 256
ASSIGN_ROWS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Balance(Rule):
    """Caps clusters of alike pictures. clusters 0: one for every 1,000 rows, from 2 to 10,000."""

    type: ClassVar[str] = "balance"
    barrier: ClassVar[bool] = True
    records: ClassVar[Column] = Column("cluster", "int64")
    embedding: str = "clip.image_embedding"
    clusters: int = 0
    max_share: float | None = None
    temperature: float | None = None
    by: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.max_share is None) == (self.temperature is None):
            raise ValueError("a balance rule takes either max_share or temperature")
        if self.max_share is not None and not 0 < self.max_share <= 1:
            raise ValueError(f"max_share {self.max_share} of a balance rule is not in (0, 1]")
        if self.temperature is not None and self.temperature < 1:
            raise ValueError(f"temperature {self.temperature} of a balance rule is less than 1")
        if self.clusters < 0:
            raise ValueError(f"clusters {self.clusters} of a balance rule is negative")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.embedding, "image_id", *((self.by,) if self.by else ()))

    def threshold_text(self) -> str:
        if self.max_share is not None:
            return f"at most {self.max_share:.4g} of all in one cluster"
        return f"clusters at temperature {self.temperature:g}"

    def judge(self, table: Table) -> Verdicts:
        vectors_ND = table[self.embedding]
        count = len(vectors_ND)
        usable = np.isfinite(vectors_ND).all(axis=1) & (np.abs(vectors_ND).max(axis=1, initial=0) > 0)
        order = occurrence_order(table)
        order = order[usable[order]]
        clusters = np.full(count, -1, np.int32)
        clusters[order] = cluster(vectors_ND[order], self._clusters_for(len(order)), self.seed)
        rejected, reasons = np.zeros(count, bool), {}
        sizes = np.bincount(clusters[order]) if len(order) else np.zeros(0, np.int64)
        allowed = self._allowed(sizes)
        for number in np.flatnonzero(sizes > allowed).tolist():
            members = order[clusters[order] == number]
            best_first = members[np.argsort(self._rank(table, members), kind="stable")]
            for row in best_first[allowed[number] :].tolist():
                rejected[row] = True
                reasons[row] = f"cluster {number} has {sizes[number]} rows, {allowed[number]} of them stay"
        left = np.minimum(sizes, allowed)
        cut = {
            "clusters": int((sizes > 0).sum()),
            "effective_before": round(effective(sizes), 4),
            "effective_after": round(effective(left), 4),
            "largest_before": int(sizes.max(initial=0)),
            "largest_after": int(left.max(initial=0)),
        }
        return Verdicts(
            rejected,
            np.where(clusters >= 0, sizes[clusters] if len(sizes) else 0, np.nan).astype(np.float64),
            float(allowed.max()) if self.max_share is not None and len(allowed) else float("nan"),
            reasons,
            {int(row): f"{self.embedding} has no direction" for row in np.flatnonzero(~usable)},
            cut=cut,
            recorded=clusters.astype(np.int64),
        )

    def _clusters_for(self, rows: int) -> int:
        return max(1, min(self.clusters or min(max(rows // 1000, 2), 10_000), rows))

    def _allowed(self, sizes: np.ndarray) -> np.ndarray:
        """How many rows of each cluster stay, where it has that many; at least one."""
        if self.max_share is not None:
            # A decimal share times n can land a hair under the whole number that is meant.
            cap = int(np.floor(self.max_share * sizes.sum() + 1e-9))
            return np.full(len(sizes), max(cap, 1), np.int64)
        assert self.temperature is not None
        mean = sizes[sizes > 0].mean() if (sizes > 0).any() else 1.0
        shrunk = mean * (np.maximum(sizes, 1) / mean) ** (1 / self.temperature)
        return np.maximum(np.where(sizes <= mean, sizes, np.ceil(shrunk - 1e-9)), 1).astype(np.int64)

    def _rank(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Lowest stays: the column `by` from high to low (NaN last), or a seeded hash of the image."""
        if self.by:
            value = table[self.by][rows].astype(np.float64)
            return np.where(np.isfinite(value), -value, np.inf)
        ids = table["image_id"][rows].tolist()
        return np.array([_draw(self.seed, image_id) for image_id in ids], np.uint64)


def _draw(seed: int, image_id: Any) -> int:
    return int.from_bytes(hashlib.sha256(f"balance {seed} {image_id}".encode()).digest()[:8], "big")


def cluster(vectors_ND: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Spherical k-means of N vectors in D dimensions: each one's cluster (N,) int32; centroids fit a sample of them."""
    if len(vectors_ND) == 0:
        return np.zeros(0, np.int32)
    import faiss

    threads = faiss.omp_get_max_threads()
    # Sums of floats depend on how many threads share them.
    faiss.omp_set_num_threads(1)
    try:
        fit = np.arange(len(vectors_ND))
        if len(fit) > clusters * FIT_ROWS_PER_CLUSTER:
            picked = np.random.default_rng(seed).choice(fit, clusters * FIT_ROWS_PER_CLUSTER, replace=False)
            fit = np.sort(picked)
        means = faiss.Kmeans(
            vectors_ND.shape[1],
            clusters,
            niter=ITERATIONS,
            seed=seed,
            spherical=True,
            init_method=faiss.ClusteringInitMethod_AFK_MC2,
            min_points_per_centroid=1,
            max_points_per_centroid=FIT_ROWS_PER_CLUSTER,
        )
        means.train(_unit(vectors_ND[fit]))
        found = np.empty(len(vectors_ND), np.int32)
        for first in range(0, len(vectors_ND), ASSIGN_ROWS):
            part = slice(first, first + ASSIGN_ROWS)
            found[part] = means.index.search(_unit(vectors_ND[part]), 1)[1][:, 0]
        return found
    finally:
        faiss.omp_set_num_threads(threads)


def _unit(vectors_ND: np.ndarray) -> np.ndarray:
    x_ND = vectors_ND.astype(np.float32)
    return np.ascontiguousarray(x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True))


def effective(sizes: np.ndarray) -> float:
    """exp of the entropy of shares: how many clusters of one size would be as diverse. 0 where there is nothing."""
    shares = sizes[sizes > 0] / max(sizes.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0
