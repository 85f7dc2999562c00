"""Centres that InsightFace's distributed training left: a file a rank, read into a head over any number of ranks."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arguments import check_size
from .margins import AdditiveMargin, AngularMargin
from .modules import AMSoftmaxLoss
from .sharded.shards import local_part
from .values import is_number, plain

# Since 2022 (PartialFC_V2), and before (PartialFC), whose momentum lies beside it in rank_{rank}_softmax_weight_mom.pt.
_FILES = ("checkpoint_gpu_{rank}.pt", "rank_{rank}_softmax_weight.pt")


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
            or no checkpoint; the head has no memory yet.

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
    local = local_part(head.weight)
    if local.is_meta:
        raise ValueError("head must hold its centres, but they are on the meta device: call head.to_empty(device=...) first")
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


def margin_of(margin_list: Sequence[float]) -> AdditiveMargin | AngularMargin:
    """What a config's ``margin_list = (m1, m2, m3)`` means to InsightFace's ``CombinedMarginLoss``, as a margin object.

    (1, m2, 0) is ArcFace, cos(θ + m2), computed without gradient as there: dψ/dt = 1, and nothing is replaced beyond
    θ + m2 = π. With m3 > 0 it is CosFace, t − m3, whatever m1 and m2 are. Their code takes no others
    (``arcface_torch/losses.py`` since December 2022); :class:`amsoftmax_kernels.margins.CombinedMargin` takes all three.

    Raises:
        TypeError, ValueError: not three numbers, or three that InsightFace refuses too.

    Example:
        >>> from amsoftmax_kernels import AMSoftmaxLoss
        >>> from amsoftmax_kernels.insightface import margin_of
        >>> head = AMSoftmaxLoss(512, 1000, scale=64.0, margin=margin_of((1.0, 0.5, 0.0)))
        >>> head.margin
        AngularMargin(margin=0.5, beyond='cos', gradient='straight_through')
        >>> margin_of((1.0, 0.0, 0.4))
        AdditiveMargin(margin=0.4)
    """
    margins = [plain(each) for each in margin_list]
    if len(margins) != 3:
        raise ValueError(f"margin_list must be (m1, m2, m3), but it has {len(margins)} elements")
    if not all(map(is_number, margins)):
        raise TypeError(f"margin_list must hold floats, but it is {tuple(margins)}")
    m1, m2, m3 = map(float, margins)
    if m1 == 1 and m3 == 0:
        return AngularMargin(m2, gradient="straight_through")
    if m3 > 0:
        return AdditiveMargin(m3)
    raise ValueError(
        f"margin_list must be (1, m2, 0) or have m3 > 0, as InsightFace's code asks too, but it is {(m1, m2, m3)}"
    )
