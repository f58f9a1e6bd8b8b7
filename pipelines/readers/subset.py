"""DataComp's subset files: a sorted `.npy` of 128-bit uids as two unsigned 64-bit halves; a uid that stands there
twice asks for its sample twice."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import IO, TypeGuard

import numpy as np

from cluster.storage import resolve

SUBSET_DTYPE = np.dtype("u8,u8")
_UID = re.compile(r"[0-9a-f]{32}")


class Subset:
    """The uids of a subset file; `multiplicity` says how often one stands there, by binary search."""

    def __init__(self, uids: np.ndarray) -> None:
        self.uids = uids

    @classmethod
    def open(cls, address: str) -> Subset:
        """Raises ValueError for a file that is no sorted array of uids (a pickled one is never loaded)."""
        filesystem, path = resolve(address)
        try:
            with filesystem.open_input_stream(path, compression=None) as stream:
                uids = np.load(io.BytesIO(stream.read()), allow_pickle=False)
        except (ValueError, EOFError) as problem:
            raise ValueError(f"subset {address} is no .npy array: {problem}") from None
        if uids.dtype != SUBSET_DTYPE or uids.ndim != 1:
            raise ValueError(f"subset {address} holds {uids.dtype} {uids.shape}, not a row of uids (dtype u8,u8)")
        high, low = uids["f0"], uids["f1"]
        if np.any((high[1:] < high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] < low[:-1]))):
            raise ValueError(f"subset {address} is not sorted: sort it (numpy.sort) and save it again")
        return cls(uids)

    def multiplicity(self, uid: str | None) -> int:
        """How often `uid` (32 hex digits) stands in the subset; 0 for anything else."""
        if not is_uid(uid):
            return 0
        wanted = uid_pair(uid)
        return int(np.searchsorted(self.uids, wanted, "right") - np.searchsorted(self.uids, wanted, "left"))


def is_uid(text: str | None) -> TypeGuard[str]:
    """Whether `text` is a uid as DataComp has them: 32 lower-case hex digits."""
    return text is not None and _UID.fullmatch(text) is not None


def uid_pair(uid: str) -> np.ndarray:
    """A uid of 32 hex digits as a scalar array of the subset's type."""
    return np.array((int(uid[:16], 16), int(uid[16:], 16)), SUBSET_DTYPE)


def write_subset(stream: IO[bytes], uids: Iterable[str]) -> int:
    """Write the uids that have 32 hex digits, sorted, repeats kept. Returns how many."""
    pairs = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids if is_uid(uid)]
    array = np.sort(np.array(pairs, SUBSET_DTYPE))
    np.lib.format.write_array(stream, array, allow_pickle=False)
    return len(array)
