"""ReLU linear attention as its definition reads, in float64: what `training.linear_dit.linear_attention` must equal.

    out_i = Σ_j v_j · s_ij / (Σ_j s_ij + eps)        s_ij = relu(q_i) · relu(k_j)

Cost O(N²·d): every pair of tokens is scored.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_linear_attention(q_BNhd: Tensor, k_BNhd: Tensor, v_BNhd: Tensor, eps: float = 1e-15) -> Tensor:
    """(B, N, h, d) float64 from (B, N, h, d); differentiable."""
    q, k, v = (x.double() for x in (q_BNhd, k_BNhd, v_BNhd))
    score_BhNM = torch.einsum("bnhd,bmhd->bhnm", q.clamp_min(0), k.clamp_min(0))
    weight_BhNM = score_BhNM / (score_BhNM.sum(dim=-1, keepdim=True) + eps)
    return torch.einsum("bhnm,bmhd->bnhd", weight_BhNM, v)
