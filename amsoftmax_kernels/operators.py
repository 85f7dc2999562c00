"""The package's torch.library operators. An operator's body is opaque to torch.compile, which runs its fake instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The arguments that every backend's operators share: backends.Problem, and what the backward pass is given.
PROBLEM_SCHEMA = (
    "Tensor features, Tensor weight, Tensor labels, Tensor? scale, float fixed_scale, bool normalize_features, "
    "ScalarType compute_dtype, float interclass_filter, int subcentres"
)
LABELS_SCHEMA = "(Tensor labels, SymInt num_classes, int ignore_index) -> Tensor"
GRADS_SCHEMA = (
    "Tensor row_factor, Tensor grad_cosine, Tensor? grad_norm, Tensor? grad_directions, "
    "bool need_features, bool need_weight, bool need_scale"
)

_library = torch.library.Library("amsoftmax_kernels", "DEF")


def register(
    name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any], differentiable: bool = True
) -> None:
    """Define ``torch.ops.amsoftmax_kernels.<name>`` for every device; differentiated only through AMSoftmaxFunction."""
    _library.define(name + schema)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"amsoftmax_kernels::{name}", fake, lib=_library)
    if differentiable:
        torch.library.register_autograd(f"amsoftmax_kernels::{name}", _no_gradient, lib=_library)


def gradients_fake(
    features: Tensor, weight: Tensor, labels: Tensor, scale: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The fake of every backend's backward operator: gradients of features, weight and scale, of size 0 if not needed."""
    need_features, need_weight, need_scale = rest[-3:]
    return (
        features.new_empty(features.shape if need_features else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        (features if scale is None else scale).new_empty(() if need_scale else 0),
    )


def is_traced(tensor: Tensor) -> bool:
    """Whether only an operator will do; its body can be called as it is otherwise, which spares some 10 µs."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def _no_gradient(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "amsoftmax_kernels: this operator has no gradient of its own; differentiate through am_softmax_loss, once"
    )
