"""What a sharded head is made with: checks of its own arguments, and what of them must be alike on all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..arguments import compute_dtype
from ..values import is_int, is_number, type_name
from . import shards as sharding

if TYPE_CHECKING:
    from .module import ShardedAMSoftmaxLoss


def backward_pass() -> int:
    """The number of the backward pass that this is called in; -1 for none."""
    number: int = torch._C._current_graph_task_id()
    return number


def check(mesh: Any, sample_rate: Any, seed: Any, backend: Any, device: Any) -> None:
    if mesh is not None:
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh must be None or a DeviceMesh, but it is {type_name(mesh)}")
        if mesh.ndim not in (1, 2):
            raise ValueError(f"mesh must have one dimension, or two (replicas, shards), but it has {mesh.ndim}")
        if device is not None and torch.device(device).type not in (mesh.device_type, "meta"):
            raise ValueError(f"device must be of the mesh's type {mesh.device_type}, but it is {device}")
    if not is_number(sample_rate):
        raise TypeError(f"sample_rate must be a float, but it is {type_name(sample_rate)}")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate must lie in (0, 1], but it is {sample_rate}")
    if seed is not None and not is_int(seed):
        raise TypeError(f"seed must be None or an int, but it is {type_name(seed)}")
    if seed is not None and not 0 <= seed < 1 << 62:
        raise ValueError(f"seed must lie in [0, 2^62), but it is {seed}")
    if backend == "reference" and sharding.is_initialized():
        raise ValueError("backend 'reference' is the formula in one process: it cannot be sharded")


def check_whole_mean(label_smoothing: Any, sample_rate: float) -> None:
    """That labels are smoothed over all classes, if they are."""
    if is_number(label_smoothing) and label_smoothing > 0 and sample_rate < 1:
        raise ValueError("label_smoothing does not go with sample_rate: the mean of all logits is that of all centres")


def agreed(head: ShardedAMSoftmaxLoss, features: Tensor, backend: str, predict: bool | str) -> dict[str, Any]:
    """What must be alike on all ranks in a call of ``head``, for their collectives to fit together."""
    grad, sampled, updater = torch.is_grad_enabled(), head.sample_rate < 1, head._updater
    given = head.loss_options(predict)._asdict()
    given |= {"scale": _comparable(head.scale), "margin": _comparable(head.margin), "backend": backend}
    del given["save_bytes"]  # each rank's own
    return {
        "D": features.shape[1],
        "features.dtype": features.dtype,
        "compute_dtype": compute_dtype(features, head.weight),
        "features.requires_grad": grad and features.requires_grad,
        "weight.requires_grad": grad and head.weight.requires_grad,
        "optimizer": None if updater is None else updater.agreement(),
        "num_classes": head.num_classes,
        "mesh": (head.shards.replicas, head.shards.shards),
        **given,
        "equal_batches": head.equal_batches,
        "seed": head._seed,
        "sample_rate": head.sample_rate,
        "sampling_correction": head.sampling_correction if sampled else None,
        "training": head.training if sampled else None,
    }


def _comparable(option: Any) -> Any:
    """What can be said of a scale or a margin without waiting for a GPU."""
    if isinstance(option, Tensor):
        known = option.device.type == "cpu" and option.dim() == 0
        return option.item() if known else tuple(option.shape), option.device.type, option.requires_grad
    return option if isinstance(option, (int, float)) else type(option).__name__
