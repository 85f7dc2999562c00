"""Centres that InsightFace's distributed training left: a file a rank, read into a head over any number of ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .modules import AMSoftmaxLoss
from .sharded.shards import local_part

_FILE = "checkpoint_gpu_{rank}.pt"


@torch.no_grad()
def load_centres(head: AMSoftmaxLoss, folder: str | os.PathLike[str], world_size: int | None = None) -> None:
    """Read ``checkpoint_gpu_{rank}.pt`` of every rank of an InsightFace run (PartialFC_V2) into ``head.weight``.

    Each file's ``state_dict_softmax_fc`` holds ``weight [num_local, D]``; with C classes over W ranks the first C mod W
    ranks have one more than the others. Files are read with ``weights_only=True`` and mapped, so that a rank's
    memory holds little beside its own classes. Nothing is changed unless all of it fits.

    Args:
        head: an :class:`AMSoftmaxLoss` or :class:`ShardedAMSoftmaxLoss` with the run's number of classes and dimension. Each
            rank of a sharded head reads what it holds; all must see the folder.
        folder: where the files are.
        world_size: W, the ranks of the run that wrote them; None counts the files.

    Raises:
        FileNotFoundError: there is no such file, or one of the ranks' is missing.
        ValueError: the files' rows or columns are not the head's, or not shared out as InsightFace does.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import AMSoftmaxLoss
        >>> from amsoftmax_kernels.insightface import load_centres
        >>> for rank in range(2):  # as a run of two ranks leaves them
        ...     torch.save({"state_dict_softmax_fc": {"weight": torch.ones(5, 8)}}, f"checkpoint_gpu_{rank}.pt")
        >>> head = AMSoftmaxLoss(8, 10, scale=64.0, margin=0.4)
        >>> load_centres(head, ".")
        >>> bool((head.weight == 1).all())
        True
    """
    folder = Path(folder)
    if world_size is None:
        world_size = 0
        while (folder / _FILE.format(rank=world_size)).exists():
            world_size += 1
        if world_size == 0:
            raise FileNotFoundError(f"folder must hold {_FILE.format(rank=0)}, but {folder} does not")
    num_classes, dim = head.weight.shape
    each, longer = divmod(num_classes, world_size)
    shards = getattr(head, "shards", None)
    start, stop = (0, num_classes) if shards is None else (shards.start, shards.stop)
    parts, first = [], 0
    for rank in range(world_size):
        weight = _weight(folder / _FILE.format(rank=rank))
        expected = each + (rank < longer)
        if tuple(weight.shape) != (expected, dim):
            raise ValueError(
                f"folder must hold {num_classes} centres of {dim} dimensions over {world_size} ranks: "
                f"{_FILE.format(rank=rank)} should have shape [{expected}, {dim}], but it has {list(weight.shape)}"
            )
        low, high = max(start, first), min(stop, first + expected)
        if low < high:
            parts.append((low - start, weight[low - first : high - first]))
        first += expected
    local = local_part(head.weight)
    for at, part in parts:
        local[at : at + len(part)] = part


def _weight(path: Path) -> Tensor:
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    weight = checkpoint.get("state_dict_softmax_fc", {}).get("weight")
    if not isinstance(weight, Tensor):
        raise ValueError(f"folder must hold InsightFace's checkpoints, but {path.name} has no state_dict_softmax_fc weight")
    return weight
