"""Checks of the public functions' arguments before any work: errors name the argument, what it was, what it must be."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .margins import AdditiveMargin, Margin, check_value
from .operators import LABELS_SCHEMA, is_traced, register
from .values import is_int, is_number, is_readable, plain, type_name, whole

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
WITH_MARGIN = "with_margin"  # the predictions of return_predictions
REDUCTIONS = ("none", "mean", "sum")


class LossOptions(NamedTuple):
    """What :func:`amsoftmax_kernels.am_softmax_loss` is given beside tensors of the batch and the centres."""

    scale: float | Tensor = 30.0
    margin: float | Tensor | Margin = 0.35
    subcentres: int = 1
    normalize_features: bool = True
    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    interclass_filter: float | None = None
    return_predictions: bool | str = False
    backend: str | None = None
    save_bytes: int | None = None

    def plain(self) -> LossOptions:
        """With numbers of another library as Python's own."""
        return self._replace(
            scale=plain(self.scale), margin=plain(self.margin), subcentres=check_size("subcentres", self.subcentres),
            ignore_index=plain(self.ignore_index), label_smoothing=plain(self.label_smoothing),
            interclass_filter=plain(self.interclass_filter), save_bytes=whole(self.save_bytes),
        )  # fmt: skip


def check_arguments(features: Any, weight: Any, labels: Any, given: LossOptions) -> None:
    """Raise ``TypeError`` or ``ValueError`` for anything but the labels' values (:func:`canonical_labels` checks those)."""
    check_features(features, weight)
    subcentres = given.subcentres
    if weight.shape[0] % subcentres:
        raise ValueError(
            f"weight must have shape [C·K, D] with K = subcentres = {subcentres}, but it has {list(weight.shape)}"
        )
    num_classes = weight.shape[0] // subcentres
    _check_dense("labels", labels, _INTEGERS)
    if labels.shape not in ((features.shape[0],), (features.shape[0], 1)):
        advice = ""
        if labels.shape == (features.shape[0], num_classes):
            advice = ": if it is one-hot, give labels.argmax(1)"
        elif labels.numel() == features.shape[0]:
            advice = ": give labels.view(-1)"
        raise ValueError(f"labels must have shape [B] = [{features.shape[0]}], but it has {list(labels.shape)}{advice}")
    for name, tensor in (("weight", weight), ("labels", labels)):
        if tensor.device != features.device:
            raise ValueError(f"{name} must be on features' device {features.device}, but it is on {tensor.device}")
    check_scale(given.scale, features.device)
    check_margin(given.margin, num_classes, features.device)
    check_options(given)


def check_features(features: Any, weight: Any) -> None:
    """Check types, dtypes and shapes of features [B, D] and weight [C, D]."""
    _check_dense("features", features, FLOATS)
    _check_dense("weight", weight, FLOATS)
    if features.dim() != 2:
        raise ValueError(f"features must have shape [B, D], but it has {list(features.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(
            f"weight must have shape [C, D] with at least one class and dimension, but it has {list(weight.shape)}"
        )
    if features.shape[1] != weight.shape[1]:
        D, (C, dim) = features.shape[1], weight.shape
        advice = ""
        if D == C:
            advice = (
                ": if features are logits [B, C], give the embeddings [B, D] they were made from, as the loss multiplies by "
                "the centres itself; if not, embedding_dim and num_classes are swapped"
            )
        raise ValueError(f"features [B, D] and weight [C, D] must share D, but they have {D} and {dim}{advice}")


def _check_dense(name: str, tensor: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, but it is {type_name(tensor)}")
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be one of {allowed}, but its dtype is {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, but its layout is {tensor.layout}")


def check_options(given: LossOptions) -> None:
    """Check those that no tensor is needed for."""
    _, _, subcentres, normalize_features, reduction, ignore_index, label_smoothing, interclass_filter, *_ = given
    check_flag("normalize_features", normalize_features)
    if not isinstance(reduction, str):
        raise TypeError(f"reduction must be a str, but it is {type_name(reduction)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, but it is {reduction!r}")
    if not is_int(ignore_index):
        raise TypeError(f"ignore_index must be an int, but it is {type_name(ignore_index)}")
    if not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"ignore_index must fit an int64, but it is {ignore_index}")
    if interclass_filter is not None:
        if not is_number(interclass_filter):
            raise TypeError(f"interclass_filter must be None or a float, but it is {type_name(interclass_filter)}")
        if not -1 <= interclass_filter <= 1:
            raise ValueError(f"interclass_filter is a cosine and must lie in [-1, 1], but it is {interclass_filter}")
    if not is_number(label_smoothing):
        raise TypeError(f"label_smoothing must be a float, but it is {type_name(label_smoothing)}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), but it is {label_smoothing}")
    if label_smoothing > 0 and (subcentres > 1 or interclass_filter is not None):
        other = "subcentres" if subcentres > 1 else "interclass_filter"
        raise ValueError(f"label_smoothing does not go with {other}: the mean of all logits is that of all centres")
    if given.save_bytes is not None:
        if not is_int(given.save_bytes):
            raise TypeError(f"save_bytes must be None or an int, but it is {type_name(given.save_bytes)}")
        if given.save_bytes < 0:
            raise ValueError(f"save_bytes must be at least 0, but it is {given.save_bytes}")
    check_predictions(given.return_predictions)


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, but it is {type_name(value)}")


def check_predictions(value: Any) -> None:
    """Check ``return_predictions``."""
    if not isinstance(value, bool) and not (isinstance(value, str) and value == WITH_MARGIN):
        shown = repr(value) if isinstance(value, str) else type_name(value)
        raise TypeError(f"return_predictions must be a bool or {WITH_MARGIN!r}, but it is {shown}")


def check_size(name: str, value: Any) -> int:
    """A positive int."""
    value = plain(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, but it is {type_name(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, but it is {value}")
    return value


def check_scale(scale: Any, device: torch.device | None = None) -> None:
    """Check s. The value of a tensor is read only where that does not synchronize."""
    if isinstance(scale, Tensor):
        if not scale.dtype.is_floating_point:
            raise TypeError(f"scale must be a float or a floating-point tensor, but its dtype is {scale.dtype}")
        if scale.dim() != 0:
            raise ValueError(f"scale must be a 0-d tensor, but its shape is {list(scale.shape)}")
        if device is not None and scale.device.type != "cpu" and scale.device != device:
            raise ValueError(f"scale must be on the CPU or on features' device {device}, but it is on {scale.device}")
        if scale.device.type != "cpu" or torch.compiler.is_compiling():
            return
        value = scale.item()
    elif is_number(scale):
        value = scale
    else:
        raise TypeError(f"scale must be a float or a 0-d tensor, but it is {type_name(scale)}")
    if not (0 < value < math.inf):
        learned = " (learned: nothing but the loss keeps it there)" if getattr(scale, "requires_grad", False) else ""
        raise ValueError(f"scale must be positive and finite, but it is {value}{learned}")


def check_margin(margin: Any, num_classes: int, device: torch.device | None = None) -> None:
    """Check m, also an AdditiveMargin's; another margin object can only be asked whether it is callable.

    The values of a tensor are read where that does not synchronize, and without ``device``, when a module is made.
    """
    if isinstance(margin, AdditiveMargin):
        margin = margin.margin
    if isinstance(margin, Tensor):
        if not margin.dtype.is_floating_point:
            raise TypeError(f"margin must be floating-point, but its dtype is {margin.dtype}")
        if margin.dim() > 1 or (margin.dim() == 1 and margin.shape[0] != num_classes):
            raise ValueError(f"margin must have shape [C] = [{num_classes}], but it has {list(margin.shape)}")
        if device is not None and margin.device != device and not (margin.dim() == 0 and margin.device.type == "cpu"):
            raise ValueError(f"margin must be on features' device {device}, but it is on {margin.device}")
        # Not where it would synchronize; one that is learned may go where it goes.
        if (device is None or margin.device.type == "cpu") and not (margin.requires_grad or torch.compiler.is_compiling()):
            check_value("margin", margin)
    elif is_number(margin):
        check_value("margin", margin)
    elif not callable(margin):
        raise TypeError(f"margin must be a float, a [C] tensor or a margin object, but it is {type_name(margin)}")


def compute_dtype(features: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's if it is on (float64 is never cast), else the inputs', promoted."""
    dtype = torch.promote_types(features.dtype, weight.dtype)
    device_type = features.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return dtype


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of vectors of length B."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def canonical_labels(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels ``[B]`` or ``[B, 1]`` as backends take them: ``[B]`` int64, -1 for an ignored row, C for one out of range.

    Raises:
        ValueError: a label on the CPU is outside ``[0, C)`` and not ``ignore_index``. On a GPU, or where ``vmap`` maps
            labels, nothing is read; such a row becomes C, which belongs to no class, and its loss NaN.
    """
    if labels.dim() == 2:
        labels = labels[:, 0]
    if not is_traced(labels):
        return _canonical_labels(labels, num_classes, ignore_index)
    result: Tensor = torch.ops.amsoftmax_kernels.canonical_labels(labels, num_classes, ignore_index)
    return result


def _canonical_labels(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    given = labels.to(torch.int64)
    readable = labels.device.type == "cpu" and is_readable(labels)  # not under vmap over labels
    if readable and labels.numel() and not 0 <= ignore_index < num_classes:
        smallest, largest = torch.aminmax(given)
        if smallest.item() >= 0 and largest.item() < num_classes:  # as nearly always
            return given.clone() if given is labels else given  # the caller may write into theirs before the backward pass
    ignored = given == ignore_index
    labels64 = given.masked_fill(given < 0, num_classes).clamp(max=num_classes).masked_fill_(ignored, -1)
    if readable and bool((invalid := labels64 == num_classes).any()):
        row = int(invalid.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {num_classes}) or be ignore_index={ignore_index}, "
            f"but labels[{row}] is {int(given[row])}"
        )
    return labels64


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast; entering it costs nothing where autocast is off."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


# An operator, so that the check of the values also runs where torch.compile has traced the caller.
register(
    "canonical_labels",
    LABELS_SCHEMA,
    _canonical_labels,
    lambda labels, *others: torch.empty_like(labels, dtype=torch.int64),
    differentiable=False,
)
