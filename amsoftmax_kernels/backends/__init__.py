"""The contract of a backend, and the choice of one.

A backend does the B×C work over one shard of classes and knows neither the margin nor the loss. It is a module of this
package, imported when first asked for, with ``unavailable_reason``, ``serves``, ``forward`` and ``backward`` as in
:class:`Backend`. ``reference`` is none of these: it is the formula, and is called by the public function itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Hashable
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

# By preference where nothing else is known (:func:`_ordered`): kernels before plain PyTorch, and Triton's, which need no
# nvcc, before those in C++. "reference" is always there.
NAMES: tuple[str, ...] = ("triton", "cuda", "chunked", "reference")


class Problem(NamedTuple):
    """One shard of classes and the rows against it: what both passes are given, checked."""

    features: Tensor  # [B, D]
    weight: Tensor  # [C, D]
    labels: Tensor  # [B] int64: negative where ignored, C or more where the class is not in this shard
    scale: Tensor  # 0-d, on the CPU or on the tensors' device; ‖x‖ takes its place without normalize_features
    normalize_features: bool
    compute_dtype: torch.dtype
    interclass_filter: float  # negatives of a larger cosine are left out of z; infinity leaves none out


class Forward(NamedTuple):
    """What the forward pass leaves for the loss and for the backward pass."""

    z: Tensor  # [B] Σ_{j≠y} 2^(log2(e)·logit − shift); 0 for an ignored row
    shift: Tensor  # [B] the largest log2(e)·logit, taken off; 0 where logits are bounded
    cosine: Tensor  # [B] t, exact; 0 for a row whose label is not in this shard
    norm: Tensor  # [B] ‖x‖; 1 for an ignored row
    inverse_norm: Tensor  # [C] 1/‖w‖, 0 for a zero row
    kept: Tensor  # the terms of z that fit save_bytes, laid out as the backend likes
    kept_shift: Tensor  # the shift of each part of them, when it was kept
    rows: Tensor  # [B, D] Σ_j term·ŵ_j, if the backend makes it in the forward pass; else of size 0
    best: Tensor  # [B] the largest cosine of a negative; of size 0 if no prediction was asked for
    best_class: Tensor  # [B] int64, the class it belongs to


class LossForward(NamedTuple):
    """The loss for a constant margin, and what its gradients take beside the problem."""

    loss: Tensor
    predictions: Tensor | None  # [B] int64, if asked for
    labels: Tensor  # those of the problem, as ``canonical_labels`` makes them
    saved: tuple[Tensor, ...]  # a backend's own
    layout: Hashable  # what else it has to know of them: equal for equal calls, as another's ``saved`` may be read by it


class LossAtOnce(NamedTuple):
    """The whole loss for a constant margin, with its gradients for an upstream gradient of 1, in the accumulate dtype."""

    loss: Tensor
    predictions: Tensor | None  # [B] int64, if asked for
    grad_features: Tensor | None  # [B, D], and the others, where they will be needed
    grad_weight: Tensor | None  # [C, D]
    grad_scale: Tensor | None


class Backend(Protocol):
    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run on this machine; None if it can."""

    def serves(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether tensors on this device, computed in this dtype, can be given to it."""

    def canonical_labels(self, labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
        """As :func:`amsoftmax_kernels.arguments.canonical_labels`."""

    def forward(self, problem: Problem, save_bytes: int, predict: bool, need_rows: bool, need_weight: bool) -> Forward:
        """``predict``: find the best negative. ``need_rows``: the gradient of features or scale will be asked for;
        ``need_weight``: that of weight will."""

    def loss_at_once(
        self, problem: Problem, ignore_index: int, margin: float, mean: bool, predict: bool
    ) -> LossAtOnce | None:
        """The sum or mean of the loss where it is quicker in one go; else None. Labels as in :meth:`forward_loss`."""

    def forward_loss(
        self,
        problem: Problem,
        save_bytes: int,
        predict: bool,
        need_rows: bool,
        need_weight: bool,
        ignore_index: int,
        margin: float,
        reduction: str,
        need_scale: bool,
    ) -> LossForward:
        """:meth:`forward`, and the loss for one margin with its derivatives, as in :mod:`.margin`.

        The problem's labels are those that :meth:`canonical_labels` is given, and come back as it makes them.
        """

    def backward_loss(
        self,
        problem: Problem,
        saved: tuple[Tensor, ...],
        layout: Hashable,
        upstream: Tensor,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of :meth:`forward_loss`, as :meth:`backward` returns them, the scale's whole."""

    def backward(
        self,
        problem: Problem,
        saved: Forward,
        row_factor: Tensor,  # [B] gradient with respect to log z, over z
        grad_cosine: Tensor,  # [B]
        grad_norm: Tensor | None,  # [B]
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of features, weight and scale (through z), each of size 0 where it is not needed.

        ``needs`` as :meth:`forward` was told, unless it kept all terms: then in any parts.
        """


_loaded: dict[str, Backend] = {}


def load(name: str) -> Backend:
    """The backend of this name (not ``reference``)."""
    if name not in _loaded:
        _loaded[name] = cast(Backend, importlib.import_module(f"{__name__}.{name}"))
    return _loaded[name]


def _ordered(device: torch.device | None = None) -> tuple[str, ...]:
    """:data:`NAMES`, fastest first by the estimates (bench/): none has been timed on a GPU yet."""
    if "cuda" in NAMES and load("cuda").comes_first(device):  # type: ignore[attr-defined]
        return ("cuda", *(name for name in NAMES if name != "cuda"))
    return NAMES


def unavailable_reason(name: str) -> str | None:
    """Why a backend cannot run here, None if it can."""
    if name == "reference":
        return None
    return load(name).unavailable_reason()


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, fastest first."""
    return [name for name in _ordered() if unavailable_reason(name) is None]


def check_available(name: str | None) -> None:
    """Check a backend's name.

    Raises:
        TypeError: ``name`` is neither None nor a str.
        ValueError: there is no such backend, or it cannot run here.
    """
    if name is None:
        return
    if not isinstance(name, str):
        raise TypeError(f"backend must be None or a str, but it is {type(name).__name__}")
    if name not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, but it is {name!r}")
    reason = unavailable_reason(name)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot run here: {reason}; available: {', '.join(available_backends())}")


# torch.compile does not trace imports: it takes the choice as a constant, after which the backend is loaded.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose(name: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend to use: ``name`` if it can serve these tensors, the fastest that can if it is None.

    Raises:
        TypeError, ValueError: as :func:`check_available`, and where it cannot serve tensors of this device and dtype.
    """
    check_available(name)
    if name is None and device.type == "cpu":
        load("chunked")
        return "chunked"  # another that serves CPU tensors only emulates a GPU
    if name is None:
        return next(each for each in _ordered(device) if unavailable_reason(each) is None and _serves(each, device, dtype))
    if not _serves(name, device, dtype):
        check_available(name)  # a build that was tried just now has failed
        raise ValueError(f"backend {name!r} does not serve {dtype} on {device}")
    return name


def _serves(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    return name == "reference" or load(name).serves(device, dtype)
