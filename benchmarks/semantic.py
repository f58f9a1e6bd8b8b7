"""Semantic duplicates among a million CLIP-sized embeddings: bounded in memory, and how many pairs the clusters hide.

    python benchmarks/semantic.py --quick

A million unit vectors of 512 half-precision numbers lie in a file that is mapped, not read. Their variance falls off as
1/i over the directions, with no clusters for k-means to find. Nine in ten are on their own; the others are copies of
earlier ones at a cosine of about 0.995. The rule runs in a process of its own, on two threads.

First what it drops: everything it drops must truly lie within eps of its keeper, in double precision, and that keeper
must be kept. Then what it misses: a copy and its original may fall into different clusters. The peer is faiss's own
search for it (IndexIVFFlat of as many cells, range search, one probe), among fewer rows; pairs alone, no keepers.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from harness import arguments, conclude, machine
from stages.semantic import SemanticDuplicates

WIDTH = 512
EPS = 0.01
LIMIT_BYTES = 8e9
LEAST_RECALL = 0.9
THREADS = 2


def write_embeddings(path: Path, count: int) -> np.ndarray:
    """(N,) the row that each row is a copy of, itself for an original; the embeddings go to a file."""
    rng = np.random.default_rng(0)
    copies = count // 10
    source = np.arange(count)
    source[-copies:] = rng.integers(0, count - copies, copies)
    scale_D = (np.arange(1, WIDTH + 1) ** -0.5).astype(np.float32)
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(count, WIDTH))
    # Originals first: no piece may hold a copy and what it is a copy of.
    pieces = np.split(np.arange(count), [*range(0, count - copies, 10_000), *range(count - copies, count, 10_000)])
    for part in pieces:
        fresh = rng.standard_normal((len(part), WIDTH), np.float32) * scale_D
        fresh /= np.linalg.norm(fresh, axis=1, keepdims=True)
        is_copy = source[part] != part
        fresh[is_copy] = vectors[source[part[is_copy]]].astype(np.float32) + 0.1 * fresh[is_copy]
        vectors[part] = fresh / np.linalg.norm(fresh, axis=1, keepdims=True)
    vectors.flush()
    return source


def make_table(vectors: np.ndarray) -> dict[str, np.ndarray]:
    count = len(vectors)
    stirred = (np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(">u8")
    return {
        "uid": np.char.encode(np.array([f"{value:016x}" for value in stirred.tolist()]), "ascii"),
        "shard": np.zeros(count, np.int32),
        "index": np.arange(count),
        "decode.pixels": np.where(np.arange(count) < count - count // 10, 2, 1),
        "size_bytes": np.ones(count, np.int64),
        "clip.image_embedding": vectors,
    }


def _measured(path: str, connection: multiprocessing.connection.Connection) -> None:
    import faiss

    faiss.omp_set_num_threads(THREADS)
    vectors = np.load(path, mmap_mode="r")
    table = make_table(vectors)
    began = time.monotonic()
    answer = SemanticDuplicates(eps=EPS).judge(table)
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    connection.send((answer.keeper, answer.distance, seconds, peak))


def measured(path: Path) -> tuple[np.ndarray, np.ndarray, float, float]:
    """(keepers, distances, wall seconds, peak bytes with mapped pages) of a run in a fresh process."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(THREADS)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(str(path), theirs))
    process.start()
    theirs.close()
    answer = ours.recv()
    process.join()
    return answer


def wrong_drops(vectors: np.ndarray, keeper: np.ndarray, distance: np.ndarray) -> int:
    """Dropped rows whose keeper is not kept, or not as near as was said."""
    dropped = np.flatnonzero(keeper >= 0)
    wrong = int((keeper[keeper[dropped]] >= 0).sum())
    for start in range(0, len(dropped), 10_000):
        rows = dropped[start : start + 10_000]
        a, b = vectors[rows].astype(np.float64), vectors[keeper[rows]].astype(np.float64)
        apart = 1 - (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
        wrong += int(((apart > EPS + 1e-6) | (np.abs(apart - distance[rows]) > 1e-6)).sum())
    return wrong


def faiss_seconds(vectors: np.ndarray) -> float:
    import faiss

    faiss.omp_set_num_threads(THREADS)
    rows = np.ascontiguousarray(vectors, np.float32)
    began = time.monotonic()
    cells = SemanticDuplicates().cluster_count(len(rows))
    quantizer = faiss.IndexFlatIP(WIDTH)
    index = faiss.IndexIVFFlat(quantizer, WIDTH, cells, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add(rows)
    index.range_search(rows, 1 - EPS)
    return time.monotonic() - began


def main() -> None:
    options = arguments(__doc__)
    print(machine("numpy", "faiss-cpu"))
    count, fewer = (50_000, 20_000) if options.quick else (1_000_000, 100_000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "embeddings.npy"
        source = write_embeddings(path, count)
        keeper, distance, seconds, peak = measured(path)
        vectors = np.load(path, mmap_mode="r")
        wrong = wrong_drops(vectors, keeper, distance)
        copies = np.flatnonzero(source != np.arange(count))
        recall = float((keeper[copies] >= 0).mean())
        extra = int((keeper >= 0).sum() - (keeper[copies] >= 0).sum())
        print(f"{count:,} rows, {len(copies):,} copies: {recall:.4f} of them dropped, {extra} others, {wrong} wrongly")
        print(f"{seconds:.1f} s on {THREADS} threads, peak {peak / 1e9:.2f} GB, mapped pages of the file included")
        few = Path(folder) / "few.npy"
        write_embeddings(few, fewer)
        part = np.load(few)
        _, _, ours, _ = measured(few)
        theirs = faiss_seconds(part)
        print(f"{fewer:,} rows: ours {ours:.2f} s, faiss IVF range search {theirs:.2f} s")
    conclude(
        claim=f"semantic duplicates among {count:,} embeddings of {WIDTH} numbers",
        value=peak / 1e9,
        unit="GB peak",
        limit=f"under {LIMIT_BYTES / 1e9:.0f} GB; no row dropped wrongly; at least {LEAST_RECALL:.0%} of copies found",
        peer=f"faiss IndexIVFFlat range search, {fewer:,} rows: {theirs:.3g} s",
        ratio=theirs / ours,
        holds=wrong == 0 and extra == 0 and recall >= LEAST_RECALL and peak < LIMIT_BYTES,
        recall=round(recall, 4),
        seconds=round(seconds, 1),
        seconds_per_million=round(seconds / count * 1e6, 1),
    )


if __name__ == "__main__":
    main()
