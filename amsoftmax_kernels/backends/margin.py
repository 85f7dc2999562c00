"""The step between the two passes for a constant margin: vectors of length B, in closed form and in plain PyTorch.

Any other margin is differentiated by autograd, which takes some thirty operations more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..margins import count_rows
from . import Forward, Problem


def additive_margin(problem: Problem, saved: Forward, margin: float, mean: bool) -> tuple[Tensor, Tensor]:
    """AM-Softmax's loss of each row, softplus(log z − s(t − m)), and its derivatives (design: the gradient's a and τ).

    With p = sigmoid(log z − s(t − m)) the derivatives ``[3, B]`` are p/z (with respect to log z, divided by z), −s·p (to t)
    and −p(t − m) (to s, or to ‖x‖ in its place). An ignored row has zeros; one whose label is out of range has NaN. For a
    ``mean`` all are divided by the number of rows that are not ignored.
    """
    labels, cosine = problem.labels, saved.cosine
    s: float | Tensor = saved.norm
    if problem.normalize_features:
        s = problem.fixed_scale if problem.scale is None else problem.scale.to(cosine.device, cosine.dtype)
    if cosine.device.type != "cpu":  # on the CPU such a label was an error
        cosine = cosine.masked_fill(labels >= problem.weight.shape[0], math.nan)
    above = cosine - margin
    v = torch.add(saved.z.log(), saved.shift, alpha=math.log(2)) - above * s
    # Above 40, log(1 + e^v) is v to the last bit of a float64. For an ignored row v is −∞: its loss and p are 0.
    rows, p = softplus(v, threshold=40), v.sigmoid()
    if mean:
        count = count_rows(labels)
        rows, p = rows / count, p / count
    # z = 0 where there is no negative (one class) or all vanish beside the target: then p is 0 too.
    by_z = p / saved.z.clamp(min=torch.finfo(p.dtype).tiny)
    return rows, torch.stack([by_z, p * -s, p * -above])


def predictions(target: Tensor, best: Tensor, best_class: Tensor, labels: Tensor) -> Tensor:
    """The class of the largest cosine of each row, ``[B]``: the label where no negative's is larger than the target's.

    The target's may have its margin taken off. An ignored row has -1.
    """
    return torch.where((target.detach() >= best) | (labels < 0), labels, best_class)
