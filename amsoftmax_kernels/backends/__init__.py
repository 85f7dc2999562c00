"""The contract of a backend, and the choice of one.

A backend does the B×C work over one shard of classes. It is a module of this package, imported when first asked for, with
the functions of :class:`Backend`; its two passes know neither the margin nor the loss, which are vectors of length B.
``reference`` is none of these: it is the formula, and is called by the public function itself.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from .chunking import kind

if TYPE_CHECKING:
    from .update import Update

# Kernels before plain PyTorch, and Triton's, which need no nvcc, before those in C++. "reference" is always there.
MOST_SUBCENTRES = 8  # of a class, to kernels: a group of so many neighbouring columns lies in one thread or a few
NAMES: tuple[str, ...] = ("triton", "cuda", "chunked", "reference")


class Problem(NamedTuple):
    """One shard of classes and the rows against it, checked: what both passes are given."""

    features: Tensor  # [B, D]
    weight: Tensor  # [C, D]; of sub-centres each is a row, C their number, and a label the nearest of its class's
    labels: Tensor  # [B] int64: negative where ignored, C or more where the class is not in this shard
    scale: Tensor | None  # 0-d, on the CPU or on the tensors' device; None where s is a number
    fixed_scale: float  # that number
    normalize_features: bool  # if not, ‖x‖ takes the place of s
    compute_dtype: torch.dtype
    interclass_filter: float  # negatives of a larger cosine are left out of z; infinity leaves none out
    subcentres: int = 1  # K: each K rows of weight are one class, of which the nearest alone has a term in z


def scale_fields(scale: float | Tensor) -> tuple[Tensor | None, float]:
    """A problem's ``scale`` and ``fixed_scale``. A number stays one: a CUDA graph cannot hold a tensor on the CPU."""
    return (scale, 0.0) if isinstance(scale, Tensor) else (None, float(scale))


def host_scale(problem: Problem) -> float | None:
    """s where the host knows it, which takes no synchronization: as a number, or as a tensor on the CPU."""
    if problem.scale is None:
        return problem.fixed_scale
    if problem.scale.device.type != "cpu":
        return None
    s: float = problem.scale.item()
    if not s > 0:
        raise ValueError(f"scale must be positive and finite, but it is {s}")
    return s


class Request(NamedTuple):
    """What the forward pass is asked for."""

    save_bytes: int  # of the terms of z that may be kept for the backward pass
    predict: bool  # find each row's best negative
    need_rows: bool  # a gradient of features or scale will be asked for
    margin: float | None = None  # a constant one: the loss and its derivatives are asked for, and z may be left out
    mean: bool = False  # these are divided by the number of rows that are not ignored


class Forward(NamedTuple):
    """What the forward pass leaves for the loss and for the backward pass."""

    z: Tensor  # [B] Σ_{j≠y} 2^(log2(e)·logit − shift); 0 for an ignored row. May be of size 0 with a margin
    shift: Tensor  # [B] the largest log2(e)·logit, taken off; 0 where logits are bounded
    cosine: Tensor  # [B] t, exact; 0 for a row whose label is not in this shard
    norm: Tensor  # [B] ‖x‖; 1 for an ignored row
    inverse_norm: Tensor  # [C] 1/‖w‖, 0 for a zero row
    kept: Tensor  # the terms of z that fit save_bytes, laid out as the backend likes
    kept_shift: Tensor  # the shift of each part of them, when it was kept
    rows: Tensor  # [B, D] Σ_j term·ŵ_j over the kept terms, if the backend makes it in the forward pass; else of size 0
    best: Tensor  # [B] the largest cosine of a negative; of size 0 if no prediction was asked for
    best_class: Tensor  # [B] int64, the class it belongs to: j of its centres j·K to j·K + K − 1
    derivatives: Tensor | None = None  # [3, B] and
    loss: Tensor | None = None  # [B]: with a margin, what margin.additive_margin makes of these


class Upstream(NamedTuple):
    """The gradients that the loss hands to the backward pass, ``[B]`` each."""

    row_factor: Tensor  # with respect to log z, divided by z
    cosine: Tensor  # with respect to t
    norm: Tensor | None  # with respect to ‖x‖; None stands for 0
    directions: Tensor | None = None  # [D] with respect to each ŵ_j, the same of all, beside what flows through z and t


class Needs(NamedTuple):
    """Whose gradients are asked for."""

    features: bool
    weight: bool
    scale: bool


class Traits(NamedTuple):
    """What decides which kernels serve a call, beside the number of rows and classes."""

    device: torch.device
    compute_dtype: torch.dtype
    features_dtype: torch.dtype
    weight_dtype: torch.dtype
    width: int  # D
    normalize_features: bool
    bounded: bool  # the scale is a number that needs no shift
    filtered: bool
    predict: bool
    subcentres: int = 1


class Backend(Protocol):
    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run on this machine; None if it can."""

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it does not serve tensors on this device that are computed in this dtype; None if it does."""

    def forward(self, problem: Problem, request: Request) -> Forward: ...

    def backward(
        self, problem: Problem, saved: Forward, upstream: Upstream, needs: Needs, update: Update | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of features, weight and scale (through z), each of size 0 where it is not needed.

        With an ``update`` the weight's is of size 0 too: where it is needed, the centres are updated in its place. The
        others are those of the centres before.
        """


_loaded: dict[str, Backend] = {}
_warned: set[str] = set()
_choices: dict[tuple[Any, ...], str] = {}  # made in this process: a step looks one up


def load(name: str) -> Backend:
    """The backend of this name (not ``reference``)."""
    if name not in _loaded:
        _loaded[name] = cast(Backend, importlib.import_module(f"{__name__}.{name}"))
    return _loaded[name]


def unavailable_reason(name: str) -> str | None:
    """Why a backend cannot run here, None if it can."""
    return None if name == "reference" else load(name).unavailable_reason()


def refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend that can run here does not serve such tensors, None if it does."""
    return None if name == "reference" else load(name).refusal(device, dtype)


def _refused(name: str, traits: Traits) -> str | None:
    """As :func:`refusal`, and of how many sub-centres kernels serve."""
    if name in ("triton", "cuda") and traits.subcentres > MOST_SUBCENTRES:
        return f"it serves up to {MOST_SUBCENTRES} sub-centres"
    return refusal(name, traits.device, traits.compute_dtype)


def serves(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend that can run here serves such tensors."""
    return refusal(name, device, dtype) is None


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, fastest first. None has been timed on a GPU yet.

    Example:
        >>> from amsoftmax_kernels import available_backends
        >>> available_backends()[-2:]  # after those on GPU kernels, if any can run
        ['chunked', 'reference']
    """
    return [name for name in NAMES if unavailable_reason(name) is None]


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


def choose(name: str | None, traits: Traits) -> str:
    """The backend to use: ``name`` if it can serve such tensors, the fastest that can if it is None.

    Raises:
        TypeError, ValueError: as :func:`check_available`, and where it cannot serve tensors of this device and dtype.
        RuntimeError: it failed its proof on this device; or it has none yet, and a CUDA graph is being captured.
    """
    if name is not None and not isinstance(name, str):
        check_available(name)
    chosen: str = _chosen(name, *traits)
    return chosen


def _chosen(name: str | None, device: torch.device, compute_dtype: torch.dtype, *values: Any) -> str:
    # As which float32 is multiplied is PyTorch's setting, read for a GPU alone: a step asks.
    how = kind(compute_dtype) if device.type == "cuda" else None
    key = (name, device, compute_dtype, how, *values)
    found = _choices.get(key)
    if found is None:
        traits = Traits(device, compute_dtype, *values)
        found = _choices[key] = _fastest(traits) if name is None else _named(name, traits)
    return found


# torch.compile takes the choice as a constant: it traces neither imports nor proofs. Of a tuple it would make an empty one.
# This is all that torch.compiler.assume_constant_result does, but for importing Dynamo, which takes longer than torch.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _named(name: str, traits: Traits) -> str:
    check_available(name)
    reason = _refused(name, traits)
    if reason is not None:
        check_available(name)  # a build that was tried just now has failed
        raise ValueError(f"backend {name!r} does not serve {traits.compute_dtype} on {traits.device}: {reason}")
    cause = _unproven(name, traits)
    if cause is not None:
        raise RuntimeError(f"backend {name!r} failed its proof on {_card(traits.device)}: {cause}")
    return name


def _fastest(traits: Traits) -> str:
    """The first candidate that serves such tensors. What stands in for a GPU's kernels says so, once."""
    failed: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name in _candidates(traits.device):
        reason = unavailable_reason(name) or _refused(name, traits)
        cause = None if reason is not None else _unproven(name, traits)
        if reason is None and cause is None:
            break
        failed |= {} if cause is None else {name: cause}
        refused |= {} if reason is None else {name: reason}
    for other, cause in failed.items():
        _warn(f"backend {other!r} failed its proof on {_card(traits.device)}: {cause}; {name!r} serves instead")
    if refused and name in ("chunked", "reference"):
        reasons = "; ".join(f"{other!r}: {reason}" for other, reason in refused.items())
        _warn(f"tensors on {_card(traits.device)} are served by {name!r}, without fused kernels, as no other can: {reasons}")
    return name


def _candidates(device: torch.device) -> tuple[str, ...]:
    """The backends to choose from, fastest first. Nothing is built that was not asked for: C++ is one where it is named."""
    if device.type != "cuda":  # another that serves CPU tensors only emulates a GPU
        return ("chunked", "reference")
    names = [name for name in NAMES if name != "cuda"]
    if "cuda" in NAMES and (where := load("cuda").place(device)) is not None:  # type: ignore[attr-defined]
        names.insert(where, "cuda")
    return tuple(names)


def _unproven(name: str, traits: Traits) -> str | None:
    """Why this backend has not proven itself on such tensors; None if it has, or need not."""
    if name not in ("triton", "cuda") or not _proves(traits.device):
        return None
    from . import proof

    return proof.failure(name, traits)


def _proves(device: torch.device) -> bool:
    return device.type == "cuda"  # on a CPU kernels are emulated


def _card(device: torch.device) -> str:
    from . import proof

    return proof.describe(device)


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"amsoftmax_kernels: {message}", RuntimeWarning, stacklevel=2)
