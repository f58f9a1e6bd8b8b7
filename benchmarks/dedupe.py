"""Near-duplicates among millions of 64-bit hashes: every pair within 4 bits, on two cores.

    python benchmarks/dedupe.py --quick
    python benchmarks/dedupe.py --count 100000000        # also this many uniform hashes

First the pairs: among 50,000 hashes the search must find exactly those that comparing every pair finds, among uniform
hashes and among clustered ones. Then time and peak memory, each case in a process of its own. The claim is on CPU
seconds of all threads together, which neighbours on the machine shift less; the wall time is printed beside them:

    uniform     random hashes, and 5 % of them copies of others with up to 4 bits flipped
    clustered   pHashes of seeded drawings and of edits of them (shifted, brightened, noisy), with few bits flipped to
                make as many as asked for: low bits that hardly vary, large groups of near-equals

The peer finds the same pairs by faiss's multi-index hashing (IndexBinaryMultiHash, four bands of 16 bits, one flip
each, which is complete within 4 bits), among fewer hashes, because it takes longer; its pairs must be ours.

Last, what the search cannot know: how many of the pairs are of different pictures. See
benchmarks/dedupe_quality.py, which bounds it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import resource
import time
from collections.abc import Callable

import numpy as np

from harness import arguments, conclude, machine
from stages.hamming import choose_tables, hamming_pairs, value_pairs
from stages.hashing import phash64

RADIUS = 4
THREADS = 2
CHECKED = 50_000
LIMIT_SECONDS, LIMIT_BYTES = 60.0, 4e9
DRAWINGS = 20_000


def uniform(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    copies = count // 20
    hashes[-copies:] = flipped(rng, hashes[rng.integers(0, count - copies, copies)], RADIUS)
    return hashes


def flipped(rng: np.random.Generator, hashes: np.ndarray, most: int) -> np.ndarray:
    """Hashes with up to `most` bits flipped in each."""
    flips = rng.integers(0, most + 1, len(hashes))
    for turn in range(most):
        bit = np.uint64(1) << rng.integers(0, 64, len(hashes), dtype=np.uint64)
        hashes = np.where(flips > turn, hashes ^ bit, hashes)
    return hashes


def drawings(rng: np.random.Generator, count: int) -> np.ndarray:
    """(N, 32, 32) uint8 greys: a gradient, a few blobs and a box, as plain as clip art."""
    y_YX, x_YX = np.mgrid[0:32, 0:32] / 31.0
    slope_N2 = rng.normal(0, 60, (count, 2, 1, 1))
    grey_NYX = 128 + slope_N2[:, 0] * (x_YX - 0.5) + slope_N2[:, 1] * (y_YX - 0.5)
    for _ in range(3):
        centre_N2, size_N, shade_N = (
            rng.random((count, 2, 1, 1)),
            rng.uniform(0.02, 0.2, count),
            rng.normal(0, 70, count),
        )
        apart_NYX = (x_YX - centre_N2[:, 0]) ** 2 + (y_YX - centre_N2[:, 1]) ** 2
        grey_NYX += shade_N[:, None, None] * (apart_NYX < size_N[:, None, None] ** 2 * 4)
    return np.clip(grey_NYX, 0, 255).astype(np.uint8)


def clustered(count: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(DRAWINGS // 2000):
        plain = drawings(rng, 2000)
        brighter = np.clip(plain * 1.15, 0, 255).astype(np.uint8)
        noisy = np.clip(plain + rng.normal(0, 6, plain.shape), 0, 255).astype(np.uint8)
        found += [phash64(edit) for edit in (plain, brighter, noisy, np.roll(plain, 1, axis=2))]
    real = np.concatenate(found)
    more = flipped(rng, rng.choice(real, max(0, count - len(real))), 12)
    return rng.permutation(np.concatenate([real, more]))[:count]


KINDS: dict[str, Callable[[int], np.ndarray]] = {"uniform": uniform, "clustered": clustered}


def every_pair(hashes: np.ndarray) -> np.ndarray:
    """(P, 2) pairs of rows within the radius, by looking at all of them; sorted."""
    found = []
    for start in range(0, len(hashes), 256):
        part = hashes[start : start + 256]
        bits = np.bitwise_count(part[:, None] ^ hashes[None, start:])
        left, right = np.nonzero(bits <= RADIUS)
        later = left < right
        found.append(np.stack([left[later] + start, right[later] + start], axis=1))
    return np.concatenate(found)


def faiss_pairs(hashes: np.ndarray) -> np.ndarray:
    """(P, 2) pairs of rows within the radius by faiss's multi-index hashing, sorted."""
    import faiss

    faiss.omp_set_num_threads(THREADS)
    codes = np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 8)
    index = faiss.IndexBinaryMultiHash(64, 4, 16)
    index.nflip = RADIUS // 4
    index.add(codes)
    limits, _, found = index.range_search(codes, RADIUS + 1)
    left = np.repeat(np.arange(len(hashes)), np.diff(limits.astype(np.int64)))
    pairs = np.stack([left, found], axis=1)[left < found]
    return np.unique(pairs, axis=0)


def our_pairs(hashes: np.ndarray) -> np.ndarray:
    left, right, _ = hamming_pairs(hashes, RADIUS, THREADS)
    return np.stack([left, right], axis=1)


def _measured(kind: str, count: int, connection: multiprocessing.connection.Connection) -> None:
    values = np.unique(KINDS[kind](count))
    began = time.monotonic(), time.process_time()
    pairs = sum(len(left) for left, _ in value_pairs(values, RADIUS, THREADS))
    seconds = time.monotonic() - began[0], time.process_time() - began[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    connection.send((len(values), pairs, *seconds, peak))


def measured(kind: str, count: int) -> tuple[int, int, float, float, float]:
    """(distinct hashes, pairs, wall seconds, CPU seconds, peak bytes) of one case in a fresh process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(kind, count, theirs))
    process.start()
    theirs.close()
    answer = ours.recv()
    process.join()
    return answer


def main() -> None:
    options = arguments(__doc__, count="one more case: this many uniform hashes")
    print(machine("numpy", "faiss-cpu"))
    claim = f"all pairs within {RADIUS} bits among ten million 64-bit hashes, on {THREADS} cores"
    limit = f"exact pairs; under {LIMIT_SECONDS:.0f} CPU s and {LIMIT_BYTES / 1e9:.0f} GB at 10 million, either kind"
    for kind, make in KINDS.items():
        hashes = make(CHECKED)
        expected, found = every_pair(hashes), our_pairs(hashes)
        equal = np.array_equal(expected, found)
        print(f"{kind}: {len(found):,} pairs among {CHECKED:,}, {'exactly' if equal else 'NOT'} those of every pair")
        if not equal:
            peer = "not timed, because pairs differ"
            conclude(claim=claim, value=0, unit="s", limit=limit, peer=peer, ratio=None, holds=False)

    counts = [100_000, 1_000_000] if options.quick else [1_000_000, 3_000_000, 10_000_000]
    print(
        f"{'hashes':>12} {'kind':<10}{'distinct':>12}{'tables':>7}{'pairs':>12}{'wall s':>9}{'CPU s':>9}{'peak GB':>9}"
    )
    cases = [(kind, count) for count in counts for kind in KINDS]
    if options.count:
        cases.append(("uniform", int(options.count)))
    results = {}
    for kind, count in cases:
        distinct, pairs, wall, cpu, peak = results[kind, count] = measured(kind, count)
        tables = choose_tables(distinct, RADIUS).count
        print(
            f"{count:>12,} {kind:<10}{distinct:>12,}{tables:>7}{pairs:>12,}{wall:>9.2f}{cpu:>9.2f}{peak / 1e9:>9.2f}",
            flush=True,
        )

    shared = uniform(50_000 if options.quick else 300_000)
    began = time.monotonic()
    theirs = faiss_pairs(shared)
    middle = time.monotonic()
    ours = our_pairs(shared)
    their_seconds, our_seconds = middle - began, time.monotonic() - middle
    same = np.array_equal(theirs, ours)
    print(f"{len(shared):,} hashes: faiss {their_seconds:.2f} s, ours {our_seconds:.2f} s, pairs equal: {same}")

    largest = [results[kind, counts[-1]] for kind in KINDS]
    slowest = max(case[3] for case in largest)
    within = slowest < LIMIT_SECONDS and max(case[4] for case in largest) < LIMIT_BYTES
    conclude(
        claim=claim if not options.quick else f"{claim} (quick: one million)",
        value=slowest,
        unit=f"CPU s for {counts[-1]:,}, the slower kind",
        limit=limit,
        peer=f"faiss IndexBinaryMultiHash, {len(shared):,} hashes: {their_seconds:.3g} s",
        ratio=their_seconds / our_seconds,
        holds=within and same,
        peak_gb=round(max(case[4] for case in largest) / 1e9, 2),
        cpu_s_per_million=round(slowest / counts[-1] * 1e6, 3),
    )


if __name__ == "__main__":
    main()
