"""Centres in InsightFace's checkpoints, a file a rank: read into a head over any number of ranks, and written from one."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_size
from ..modules import AMSoftmaxLoss
from ..sharded.shards import local_part

# Since 2022 (PartialFC_V2), and before (PartialFC), whose momentum lies beside it in rank_{rank}_softmax_weight_mom.pt.
_FILES = ("checkpoint_gpu_{rank}.pt", "rank_{rank}_softmax_weight.pt")


def _centres_of(head: AMSoftmaxLoss) -> Tensor:
    """What this process holds of them."""
    local = local_part(head.weight)
    if local.is_meta:
        raise ValueError("head must hold its centres, but they are on the meta device: call head.to_empty(device=...) first")
    if head.subcentres > 1:
        raise ValueError(
            f"head must have one centre a class, as these files have, but it has subcentres={head.subcentres}: "
            "keep_largest_subcentres leaves one"
        )
    return local


@torch.no_grad()
def load_centres(head: AMSoftmaxLoss, folder: str | os.PathLike[str], world_size: int | None = None) -> None:
    """Read the centres of every rank of an InsightFace run into ``head.weight``.

    The files are ``checkpoint_gpu_{rank}.pt``, whose ``state_dict_softmax_fc`` holds ``weight [num_local, D]``, or where
    there are none ``rank_{rank}_softmax_weight.pt``, that tensor alone, as its code wrote before 2022. With C classes over W
    ranks the first C mod W have one more than the others. Files are read with ``weights_only=True``, and mapped if their
    format allows, so that a rank's memory holds little beside its own classes. Nothing is changed unless all of it fits.

    Args:
        head: an :class:`AMSoftmaxLoss` or :class:`ShardedAMSoftmaxLoss` with the run's number of classes and dimension, not
            on the meta device. Each rank of a sharded head reads what it holds; all must see the folder.
        folder: where the files are.
        world_size: W, the ranks of the run that wrote them; None counts the files.

    Raises:
        FileNotFoundError: there is no such file, or one of the ranks' is missing.
        TypeError: ``world_size`` is not an int.
        ValueError: the files' rows or columns are not the head's, or not shared out as InsightFace does; a file is cut short
            or no checkpoint; the head has no memory yet, or sub-centres.

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
    folder, local = Path(folder), _centres_of(head)
    if world_size is not None:
        world_size = check_size("world_size", world_size)
    paths = _paths(folder, world_size)
    num_classes, dim = head.weight.shape
    each, longer = divmod(num_classes, len(paths))
    shards = getattr(head, "shards", None)
    start, stop = (0, num_classes) if shards is None else (shards.start, shards.stop)
    parts, first = [], 0
    for rank, path in enumerate(paths):
        weight = _weight(path)
        expected = each + (rank < longer)
        if tuple(weight.shape) != (expected, dim):
            raise ValueError(
                f"folder must hold {num_classes} centres of {dim} dimensions over {len(paths)} ranks: "
                f"{path.name} should have shape [{expected}, {dim}], but it has {list(weight.shape)}"
            )
        low, high = max(start, first), min(stop, first + expected)
        if low < high:
            parts.append((low - start, weight[low - first : high - first]))
        first += expected
    for at, part in parts:
        local[at : at + len(part)] = part


@torch.no_grad()
def save_centres(head: AMSoftmaxLoss, folder: str | os.PathLike[str], world_size: int | None = None) -> None:
    """Write the centres as a run of InsightFace's over ``world_size`` ranks keeps them: ``checkpoint_gpu_{rank}.pt``.

    Each file has ``state_dict_softmax_fc`` with ``weight [num_local, D]``, and nothing else: no backbone, optimizer or
    schedule. With C classes over W ranks the first C mod W have one more than the others. Every rank of a sharded head must
    call it, and writes its own share of the files.

    Args:
        head: an :class:`AMSoftmaxLoss` or :class:`ShardedAMSoftmaxLoss` with one centre a class.
        folder: where to write; made if it is not there.
        world_size: W, the ranks of the run that is to read them; None: the head's own ranks, over which its classes are.

    Raises:
        FileExistsError: there is such a file already, which may hold a backbone too.
        TypeError: ``world_size`` is not an int.
        ValueError: it is less than 1, or the head has no memory yet, or sub-centres.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import AMSoftmaxLoss
        >>> from amsoftmax_kernels.insightface import load_centres, save_centres
        >>> head, other = AMSoftmaxLoss(8, 10), AMSoftmaxLoss(8, 10)
        >>> save_centres(head, "for_insightface", world_size=4)
        >>> load_centres(other, "for_insightface")
        >>> torch.equal(head.weight, other.weight)
        True
    """
    folder, local = Path(folder), _centres_of(head)
    shards = getattr(head, "shards", None)
    ranks, rank, writes = (1, 0, True) if shards is None else (shards.shards, shards.shard, shards.replica == 0)
    world_size = ranks if world_size is None else check_size("world_size", world_size)
    each, longer = divmod(head.weight.shape[0], world_size)
    mine = range(rank, world_size, ranks)
    paths = [folder / _FILES[0].format(rank=number) for number in range(world_size)]
    for path in paths:
        if path.exists():
            raise FileExistsError(f"folder must not have such files yet, but {path} is there")
    bounds = [number * each + min(number, longer) for number in range(world_size + 1)]
    wanted = torch.cat([torch.empty(0, dtype=torch.long), *(torch.arange(bounds[n], bounds[n + 1]) for n in mine)])
    wanted = wanted.to(local.device)
    rows = local[wanted] if shards is None else shards.take_rows(local, wanted)
    if not writes:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in zip(mine, rows.cpu().split([bounds[n + 1] - bounds[n] for n in mine]), strict=True):
        temporary = paths[number].with_name(f".{paths[number].name}")
        torch.save({"state_dict_softmax_fc": {"weight": part.clone()}}, temporary)
        os.replace(temporary, paths[number])


def _paths(folder: Path, world_size: int | None) -> list[Path]:
    """The files of all ranks, in order."""
    for file in _FILES:
        paths: list[Path] = []
        while (path := folder / file.format(rank=len(paths))).exists():
            paths.append(path)
        if not paths:
            continue
        if world_size is None or len(paths) >= world_size:
            return paths[:world_size]
        raise FileNotFoundError(f"folder must hold the files of {world_size} ranks, but {folder} has no {path.name}")
    names = " or ".join(file.format(rank=0) for file in _FILES)
    raise FileNotFoundError(f"folder must hold {names}, but {folder} does not")


def _weight(path: Path) -> Tensor:
    """A rank's centres, mapped where the file is a zip archive, as PyTorch writes since 1.6."""
    try:
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"folder must hold InsightFace's checkpoints, but {path} cannot be read with weights_only=True: {error}"
        ) from error
    except OSError:
        raise
    except Exception as error:  # of many kinds, as a file can be cut anywhere
        raise ValueError(f"folder must hold whole files, but {path} cannot be read: is it cut short? {error}") from error
    weight = checkpoint
    for key in ("state_dict_softmax_fc", "weight"):
        weight = weight.get(key) if isinstance(weight, dict) else weight
    if not isinstance(weight, Tensor):
        raise ValueError(f"folder must hold InsightFace's checkpoints, but {path.name} has no state_dict_softmax_fc weight")
    return weight
