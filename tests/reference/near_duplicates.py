"""Near-duplicates the slow and plain way: every pair looked at, keepers taken one by one."""

from __future__ import annotations

import numpy as np


def hamming(left: int, right: int) -> int:
    return (int(left) ^ int(right)).bit_count()


def pairs_within(hashes: np.ndarray, radius: int) -> list[tuple[int, int, int]]:
    return [
        (i, j, hamming(hashes[i], hashes[j]))
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if hamming(hashes[i], hashes[j]) <= radius
    ]


def dropped(rows: list[dict], radius: int, same_look, held: list[bool] | None = None) -> dict[int, tuple[int, int]]:
    """row -> (keeper, distance) for rows as dicts with pixels, size_bytes, uid, shard, index, hash, look.

    held: rows that come first and are never dropped. A row with hash and look of an earlier one goes for that one, or
    with it for the same keeper, also where a nearer one was kept in between: copies of one picture name one keeper.
    """
    held = held or [False] * len(rows)
    order = sorted(
        range(len(rows)),
        key=lambda i: (
            not held[i],
            -rows[i]["pixels"],
            -rows[i]["size_bytes"],
            rows[i]["uid"],
            rows[i]["shard"],
            rows[i]["index"],
        ),
    )
    kept: list[int] = []
    result: dict[int, tuple[int, int]] = {}
    firsts: dict[tuple, int] = {}
    for row in order:
        first = firsts.setdefault((int(rows[row]["hash"]), bytes(rows[row]["look"])), row)
        if first != row and not held[row]:
            result[row] = result.get(first, (first, 0))
            continue
        near = [
            (hamming(rows[row]["hash"], rows[keeper]["hash"]), place, keeper)
            for place, keeper in enumerate(kept)
            if hamming(rows[row]["hash"], rows[keeper]["hash"]) <= radius
            and same_look(rows[keeper]["look"], rows[row]["look"])
        ]
        if near and not held[row]:
            distance, _, keeper = min(near)
            result[row] = (keeper, distance)
        else:
            kept.append(row)
    return result
