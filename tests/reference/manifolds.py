"""Improved precision and recall, one pair at a time."""

from __future__ import annotations

import numpy as np


def in_manifold(point: np.ndarray, members: np.ndarray, k: int) -> bool:
    """Whether a point lies within reach of some member: its distance to its k-th nearest other member."""
    for place, member in enumerate(members):
        others = sorted(float(np.linalg.norm(member - other)) for at, other in enumerate(members) if at != place)
        if float(np.linalg.norm(point - member)) <= others[k - 1]:
            return True
    return False
