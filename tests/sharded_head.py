"""A sharded head, a backbone before it, and batches that each rank takes its rows from."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import amsoftmax_kernels as ak

from .ranks import device

C, D, INPUTS = 37, 8, 6


def backbone(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh(), nn.Linear(16, D)).to(device(), dtype)


def batch(step: int, sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs and labels of all ranks' rows."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(sum(sizes), INPUTS, generator=generator, dtype=torch.float64)
    return inputs.to(device(), dtype), torch.randint(C, (sum(sizes),), generator=generator).to(device())


def mine(tensor: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return tensor.split(sizes)[dist.get_rank()]


def make_head(mesh: Any = None, **options: Any) -> ak.ShardedAMSoftmaxLoss:
    return ak.ShardedAMSoftmaxLoss(
        D, C, nn.Parameter(torch.tensor(16.0, dtype=torch.float64, device=device())), mesh=mesh, seed=5,
        dtype=torch.float64, device=device(), **options,
    )  # fmt: skip
