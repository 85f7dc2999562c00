"""The loss and its derivatives for one constant margin, in closed form: vectors of length B, plain PyTorch.

Any other margin is differentiated by autograd; this spares the commonest one some thirty small operations a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..arguments import canonical_labels
from ..operators import is_traced
from . import Forward, LossForward, Problem


def forward_loss(
    forward: Callable[[Problem, int, bool, bool, bool], Forward],
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
    """``forward_loss`` of a backend by its ``forward``."""
    labels, num_rows = canonical_labels(problem.labels, problem.weight.shape[0], ignore_index)
    problem = problem._replace(labels=labels)
    out = forward(problem, save_bytes, predict, need_rows, need_weight)
    loss, derivatives = constant_margin(problem, out, num_rows, margin, reduction, need_scale)
    return LossForward(loss, predictions(out, labels) if predict else None, labels, (derivatives, *out), None)


def backward_loss(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    problem: Problem,
    saved: tuple[Tensor, ...],
    layout: Hashable,
    upstream: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """``backward_loss`` of a backend by its ``backward``."""
    derivatives, *vectors = saved
    row_factor, grad_cosine, *grad_s = (derivatives * upstream).unbind()
    grad_norm = None if problem.normalize_features else grad_s[0]
    out = Forward(*vectors)
    grad_features, grad_weight, grad_scale = backward(problem, out, row_factor, grad_cosine, grad_norm, needs)
    if needs[2] and problem.normalize_features:
        grad_scale = grad_scale + grad_s[0].sum().to(grad_scale)
    return grad_features, grad_weight, grad_scale


def predictions(out: Forward, labels: Tensor) -> Tensor:
    """The class of the largest cosine of each row, the label itself where no negative's is larger."""
    return torch.where(out.cosine >= out.best, labels, out.best_class)


def constant_margin(
    problem: Problem, saved: Forward, num_rows: Tensor, margin: float, reduction: str, need_scale: bool
) -> tuple[Tensor, Tensor]:
    """AM-Softmax's loss softplus(log z − s(t − m)), reduced, and its derivatives for an upstream gradient of 1.

    With p = sigmoid(log z − s(t − m)), the derivatives ``[2 or 3, B]`` are p/z (by log z, over z), −s·p (by t) and, if
    ``need_scale``, −p(t − m) (by s, or ‖x‖ in its place); over the number of rows for the mean.
    """
    s: Tensor | float = problem.scale if problem.normalize_features else saved.norm
    count: Tensor | float = num_rows
    cosine = saved.cosine
    if cosine.device.type != "cpu":  # there such a label was an error
        cosine = torch.where(problem.labels < problem.weight.shape[0], cosine, math.nan)
    elif not is_traced(cosine):  # numbers, where reading them is free
        s, count = problem.scale.item() if problem.normalize_features else s, num_rows.item()
    above = cosine - margin
    log_z = torch.add(saved.z.log(), saved.shift, alpha=math.log(2))  # -inf for an ignored row: its loss and p are 0
    v = log_z.sub_(above * s)
    # Above 40, log(1 + e^v) is v to the last bit of a float64.
    rows = softplus(v, threshold=40)
    p = v.sigmoid_()
    loss = rows if reduction == "none" else rows.sum()
    if reduction == "mean":
        loss, p = loss / count, p.div_(count)
    # z = 0 where there is no negative (one class) or all vanish beside the target: then p is 0 too.
    derivatives = [p / saved.z.clamp(min=torch.finfo(p.dtype).tiny), p * -s]
    if need_scale:
        derivatives.append(p * -above)
    return loss, torch.stack(derivatives)
