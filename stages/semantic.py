"""Semantic duplicates: of pictures whose embeddings point the same way, one representative is kept (SemDeDup).

    stages:
      clip: {type: clip_score, model: ViT-L-14, pretrained: openai}
    rules:
      semantic: {type: semantic_duplicates, embedding: clip.image_embedding, eps: 0.01}

Embeddings are cut into clusters by spherical k-means, and compared within each (Abbas et al., "SemDeDup", 2023). A row
is dropped when its cosine with a *kept* row is at least 1 - eps, rows taken in keeper order as in stages.dedupe, so a
group keeps its best picture and a chain carries no further than eps: of a ~ b ~ c, c stays if it is not like a. Pairs
that fall into two clusters are not seen; up to EXACT_ROWS rows there is one cluster, and none is missed.

Which rows train the clusters, which cluster a row falls into and which cosine counts depend on the rows alone, not on
their order or number of workers: near ties of the single-precision products are settled in double precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stages.dedupe import greedy_keepers, held_rows
from stages.rules import Guide, Rule, Table, Verdicts, occurrence_order

EXACT_ROWS = 16384
SAMPLE_PER_CLUSTER = 256  # with 64 twice as many copies part from their originals (docs/log.md)
ITERATIONS = 10
TILE = 2048  # rows compared with each other at once: 16 MB of cosines
# Single-precision products of unit vectors are this right; what is closer to a bound is computed again.
SLACK = 1e-4
# A unit vector of D equal components says nothing about a picture; a real one deviates by about 1 / sqrt(D).
LEAST_DEVIATION = 0.02


@dataclass(frozen=True, kw_only=True)
class SemanticDuplicates(Rule):
    """Drops a row whose embedding's cosine with a kept row of its cluster is at least 1 - `eps`.

    distance: 1 - cosine. clusters: 0 takes the square root of the number of rows (one up to EXACT_ROWS rows). seed: of
    k-means. Embeddings that are not finite, or hardly vary over their components, are compared with nothing.
    """

    type: ClassVar[str] = "semantic_duplicates"
    barrier: ClassVar[bool] = True
    separable: ClassVar[bool] = True
    takes_held: ClassVar[bool] = True
    guide: ClassVar[str] = "clusters"
    embedding: str = "clip.image_embedding"
    pixels: str = "decode.pixels"
    eps: float = 0.01
    clusters: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise ValueError(f"eps {self.eps} of a semantic_duplicates rule is not in (0, 1)")
        if self.clusters < 0:
            raise ValueError(f"clusters {self.clusters} of a semantic_duplicates rule is negative; 0 chooses")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.embedding, self.pixels, "size_bytes")

    def threshold_text(self) -> str:
        return f"cosine below {1 - self.eps:g} with every kept one"

    def cluster_count(self, rows: int) -> int:
        return self.clusters or (1 if rows <= EXACT_ROWS else int(rows**0.5))

    def judge(self, table: Table) -> Verdicts:
        count = len(table["uid"])
        return self.judge_part(table, self.fit(table, count))

    def sample(self, table: Table, total: int) -> np.ndarray:
        """Rows that train the clusters, of a table that is some or all of `total` rows: usable ones of least uid.

        uids are digests, so the least are a random draw; the sample of samples is the sample of the whole.
        """
        usable = np.flatnonzero(_usable(table[self.embedding]))
        order = occurrence_order({name: table[name][usable] for name in ("uid", "shard", "index")})
        return usable[order[: self.cluster_count(total) * SAMPLE_PER_CLUSTER]]

    def fit(self, table: Table, total: int) -> Guide:
        """{"centroids": (K, D) float32 unit vectors}, from the sample among a table's rows."""
        import faiss

        count = self.cluster_count(total)
        rows = self.sample(table, total) if count > 1 else np.empty(0, np.int64)
        sample_SD = _unit(table[self.embedding][rows])
        count = min(count, len(rows))
        if count < 2:
            return {"centroids": np.zeros((1, table[self.embedding].shape[1]), np.float32)}
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)  # the order of a sum decides its last bits
        try:
            kmeans = faiss.Kmeans(
                sample_SD.shape[1],
                count,
                niter=ITERATIONS,
                seed=self.seed,
                spherical=True,
                min_points_per_centroid=1,
                max_points_per_centroid=SAMPLE_PER_CLUSTER,
            )
            kmeans.train(sample_SD)
        finally:
            faiss.omp_set_num_threads(threads)
        return {"centroids": np.asarray(kmeans.centroids, np.float32)}

    def part_of(self, table: Table, parts: int, guide: Guide) -> np.ndarray:
        # A row without a usable embedding meets nobody: any part will do.
        return np.maximum(assign(table[self.embedding], guide["centroids"]), 0) % parts

    def judge_part(self, table: Table, guide: Guide) -> Verdicts:
        count = len(table["uid"])
        held = held_rows(table)
        cluster = assign(table[self.embedding], guide["centroids"])
        pixels, size_bytes = table[self.pixels].astype(np.int64), table["size_bytes"].astype(np.int64)
        order = occurrence_order(table, cluster, ~held, -pixels, -size_bytes)
        order = order[cluster[order] >= 0]
        keeper, distance = np.full(count, -1, np.int64), np.full(count, np.nan)
        bounds = np.flatnonzero(np.diff(cluster[order])) + 1
        for rows in np.split(order, bounds):
            if len(rows) > 1:
                keeper[rows], distance[rows] = self._within(rows, table[self.embedding], held)
        rejected = keeper >= 0
        reasons = {int(row): f"cosine {1 - distance[row]:.4f} with the keeper" for row in np.flatnonzero(rejected)}
        return Verdicts(rejected, distance, float(self.eps), reasons, keeper=keeper, distance=distance)

    def _within(self, rows: np.ndarray, embedding: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keeper and distance of the rows of one cluster, in keeper order: tile by tile against those kept so far."""
        keeper, distance = np.full(len(rows), -1, np.int64), np.full(len(rows), np.nan)
        kept_KD = np.empty((0, embedding.shape[1]), np.float32)
        kept = np.empty(0, np.int64)
        for start in range(0, len(rows), TILE):
            tile = rows[start : start + TILE]
            tile_TD = _unit(embedding[tile])
            earlier, later, apart = self._close(kept_KD, tile_TD)
            # What a kept row drops can keep nothing itself.
            free = np.ones(len(tile), bool)
            free[later] = False
            free |= held[tile]
            left, right, between = self._close(tile_TD, tile_TD, free)
            nodes = np.concatenate([kept, tile])
            # Rows kept so far stand before the tile and stay.
            fixed = np.concatenate([np.ones(len(kept), bool), held[tile]])
            found, how_far = greedy_keepers(
                fixed,
                np.concatenate([earlier, left + len(kept)]),
                np.concatenate([later, right]) + len(kept),
                np.concatenate([apart, between]),
            )
            found, how_far = found[len(kept) :], how_far[len(kept) :]
            place = slice(start, start + len(tile))
            keeper[place], distance[place] = np.where(found >= 0, nodes[found], -1), how_far
            kept_KD = np.concatenate([kept_KD, tile_TD[found < 0]])
            kept = np.concatenate([kept, tile[found < 0]])
        return keeper, distance

    def _close(
        self, left_LD: np.ndarray, right_RD: np.ndarray, free: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs (left, right, 1 - cosine) within eps. free: the two are one tile; only left < right, and left free."""
        found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float64))]
        for start in range(0, len(left_LD), TILE):
            cosine_LR = left_LD[start : start + TILE] @ right_RD.T
            near = cosine_LR >= 1 - self.eps - SLACK
            if free is not None:
                near &= np.triu(np.ones(near.shape, bool), 1) & free[:, None]
            left, right = np.nonzero(near)
            left += start
            distance = 1 - _exact_cosine(left_LD, right_RD, left, right)
            close = distance <= self.eps
            found.append((left[close], right[close], distance[close]))
        left, right, distance = (np.concatenate(column) for column in zip(*found, strict=True))
        return left, right, distance


def assign(embedding_ND: np.ndarray, centroids_KD: np.ndarray) -> np.ndarray:
    """(N,) int64 nearest centroid by cosine, the first of equals; -1 for embeddings that are not usable."""
    cluster_N = np.full(len(embedding_ND), -1, np.int64)
    for start in range(0, len(embedding_ND), TILE):
        part = embedding_ND[start : start + TILE]
        usable = np.flatnonzero(_usable(part))
        unit_UD = _unit(part[usable])
        cosine_UK = unit_UD @ centroids_KD.T
        best_U = cosine_UK.argmax(1) if len(usable) else np.empty(0, np.int64)
        near_UK = cosine_UK >= cosine_UK.max(1, keepdims=True) - SLACK if len(usable) else np.zeros((0, 1), bool)
        for row in np.flatnonzero(near_UK.sum(1) > 1):
            candidates = np.flatnonzero(near_UK[row])
            exact = _exact_cosine(unit_UD, centroids_KD, np.full(len(candidates), row), candidates)
            best_U[row] = candidates[exact.argmax()]
        cluster_N[start + usable] = best_U
    return cluster_N


def _exact_cosine(left: np.ndarray, right: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """(P,) float64 cosines of left[i[p]] and right[j[p]]: the same bits whatever else is computed beside them."""
    found = np.empty(len(i))
    for start in range(0, len(i), TILE):
        a = left[i[start : start + TILE]].astype(np.float64)
        b = right[j[start : start + TILE]].astype(np.float64)
        norms = np.sqrt((a * a).sum(1) * (b * b).sum(1))
        found[start : start + TILE] = (a * b).sum(1) / np.maximum(norms, 1e-12)
    return found


def _usable(embedding_ND: np.ndarray) -> np.ndarray:
    """(N,) bool: finite, and varying over their components."""
    usable = np.zeros(len(embedding_ND), bool)
    for start in range(0, len(embedding_ND), TILE):
        part = np.asarray(embedding_ND[start : start + TILE], np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            norm = np.linalg.norm(part, axis=1)
            spread = part.std(axis=1) * part.shape[1] ** 0.5
            usable[start : start + TILE] = np.isfinite(norm) & (norm > 1e-3) & (spread > LEAST_DEVIATION * norm)
    return usable


def _unit(embedding_ND: np.ndarray) -> np.ndarray:
    """(N, D) float32 of length 1."""
    found = np.asarray(embedding_ND, np.float32)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
