"""The loss over sharded classes: each rank's own work through a backend, vectors of length B put together between ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..arguments import accumulate_dtype
from ..autograd import Updater, once_differentiable, updater_of
from ..backends.budget import BOUNDED_SCALE
from ..backends.norms import row_norms
from ..backends.subcentres import nearest
from ..backends.update import Blocks, Update
from ..smoothing import MeanCosine, sum_of_directions
from .sampling import draw_classes
from .shards import ClassShards, Rows


@dataclass(frozen=True)
class Sampling:
    """How many of the shard's classes to draw, and what becomes of them."""

    size: int  # less than the shard's classes
    seed: Tensor  # 0-d int64 on the features' device
    step: Tensor  # 0-d int64 there
    corrected: bool  # whether those drawn stand for all the others in the softmax's denominator


@dataclass(frozen=True)
class Plan:
    """What a step's function is given beside its tensors."""

    shards: ClassShards
    rows: Rows
    normalize_features: bool
    compute_dtype: torch.dtype
    interclass_filter: float
    save_bytes: int
    predict: bool
    backend: str
    sampling: Sampling | None
    differentiated: Callable[[], None]  # called by the backward pass
    updater: Updater | None  # updates the centres in the backward pass
    subcentres: int = 1
    mean: bool = False  # of the cosines to all centres is asked for

    def problem(self, features: Tensor, weight: Tensor, labels: Tensor, scale: float | Tensor) -> backends.Problem:
        return backends.Problem(
            features,
            weight,
            labels,
            *backends.scale_fields(scale),
            self.normalize_features,
            self.compute_dtype,
            self.interclass_filter,
            self.subcentres,
        )


@dataclass
class _Panel:
    """Classes that a backend is given at once."""

    weight: Tensor  # [n, D], with sub-centres one row each
    labels: Tensor  # [B] of classes until the targets are known
    classes: Tensor | None  # [n] where they are in the shard; None: all of it
    factor: float = 1.0  # how many classes each stands for
    out: backends.Forward | None = None


class ShardedFunction(torch.autograd.Function):
    """:class:`AMSoftmaxFunction` over a mesh: from this rank's rows and classes to the vectors of all rows, on every rank.

    ``apply(features, labels, weight, scale, anchor, plan)`` with ``features [b, D]`` and canonical ``labels [b]`` of this
    rank, and its shard of the centres ``[C, D]`` (``[C, K, D]`` with sub-centres); ``anchor`` is a number that needs a
    gradient where the centres are updated in the place of having one. Returns log z, t, ‖x‖ and, if asked for, the mean
    cosine to all centres ``[B]``, differentiable once,
    then the labels ``[B]``, and the largest cosine of a negative and its class for the rows of this replica (of size 0 if
    none were asked for).

    A rank's gradient of its features is that of the mean over all ranks' losses times their number: what
    DistributedDataParallel, which averages over ranks, must be given.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, labels: Tensor, weight: Tensor, scale: float | Tensor, anchor: Tensor | None, plan: Plan
    ) -> tuple[Tensor, ...]:
        shards, dtype = plan.shards, accumulate_dtype(plan.compute_dtype)
        x, labels = _gather(features, labels, plan, dtype)
        all_labels = shards.gather_replicas(labels[None], plan.rows)[0]
        panels = _panels(shards.local_labels(labels), shards.local_labels(all_labels), weight, plan)
        need_rows = ctx.needs_input_grad[0] or ctx.needs_input_grad[3]
        left = plan.save_bytes
        for panel in panels:
            if plan.subcentres > 1:
                panel.weight = panel.weight.flatten(0, 1)
                panel.labels = nearest(x, panel.weight, panel.labels, plan.subcentres)
            problem = plan.problem(x, panel.weight, panel.labels, scale)
            panel.out = backends.load(plan.backend).forward(problem, backends.Request(left, plan.predict, need_rows))
            left -= panel.out.kept.numel() * panel.out.kept.element_size()

        z, t = x.new_zeros(2, len(x), dtype=dtype)
        factors = [x.new_full((), panel.factor, dtype=dtype) for panel in panels]
        top = torch.zeros_like(z)
        if not _bounded(plan, scale):
            lowest = torch.finfo(dtype).min / 4
            tops = [torch.where(out.z > 0, out.shift, lowest) for out in map(_out, panels)]
            top = torch.stack([torch.full_like(z, lowest), *tops]).amax(0)
            shards.maximum_(top)
            factors = [factor * torch.exp2(each - top) for factor, each in zip(factors, tops, strict=True)]
        for panel, factor in zip(panels, factors, strict=True):
            z = z + _out(panel).z * factor
            t = t + _out(panel).cosine
        z, t = shards.sum_(torch.stack([z, t]))
        norm = _out(panels[0]).norm if panels else row_norms(x.double())[0].to(dtype).masked_fill(labels < 0, 1)
        log_z = torch.add(z.log(), top, alpha=math.log(2))
        best, best_class = _best(panels, plan, x)
        mean, means = x.new_zeros(0), []
        if plan.mean:
            mean = x.new_zeros(x.shape[1], dtype=torch.float64)
            if panels:  # one, as classes are not sampled here
                mean = sum_of_directions(panels[0].weight, _out(panels[0]).inverse_norm)
            mean = shards.sum_(mean) / shards.num_classes
            means = [MeanCosine.of(x, labels, mean).value().to(dtype)]
        vectors = [*shards.gather_replicas(torch.stack([log_z, t, norm, *means]), plan.rows).unbind()]
        vectors += [] if plan.mean else [x.new_zeros(0, dtype=dtype)]

        ctx.plan, ctx.updater = plan, plan.updater
        saved = [each for panel, factor in zip(panels, factors, strict=True)
                 for each in (panel.weight, panel.labels, panel.classes, factor, *_out(panel))]  # fmt: skip
        where = (labels, mean) if plan.mean else (None, None)
        ctx.save_for_backward(features, x, weight, scale if isinstance(scale, Tensor) else None, z, *where, *saved)
        ctx.scale = None if isinstance(scale, Tensor) else scale
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(all_labels, best, best_class)
        return *vectors, all_labels, best, best_class

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads[:4]):
            return (None,) * 6
        updater = updater_of(ctx)
        tensors = ctx.saved_tensors
        if updater is None:
            grad_features, grad_weight, grad_scale = _backward(ctx, tensors, grads, None)
        else:
            with updater.updating(tensors[2].view(-1, tensors[2].shape[-1])) as update:
                grad_features, grad_weight, grad_scale = _backward(ctx, tensors, grads, update)
        return grad_features, None, grad_weight, grad_scale, None, None


def _backward(
    ctx: Any, tensors: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], update: Update | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of this rank's features and centres, and of the scale; None where one is not needed."""
    plan: Plan = ctx.plan
    shards = plan.shards
    features, x, weight, scale, z, all_rows, mean, *saved = tensors
    scale = ctx.scale if scale is None else scale
    mine = plan.rows.replica_slice
    row_factor, grad_cosine = (torch.zeros_like(z) if grad is None else grad[mine] for grad in grads[:2])
    row_factor = (row_factor / z).masked_fill_(z == 0, 0)
    # By ‖x‖ itself, which every shard has: once is enough.
    grad_norm = None if grads[2] is None or shards.shard > 0 else grads[2][mine]
    need_features, need_scale = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    need_weight = ctx.needs_input_grad[2] or update is not None
    means = directions = None
    if plan.mean and grads[3] is not None:
        means = MeanCosine.of(x, all_rows, mean)
        directions = means.grad_directions(grads[3][mine], shards.num_classes).to(z.dtype)

    calls = _calls(plan, x, scale, saved, backends.Upstream(row_factor, grad_cosine, grad_norm, directions))
    grads_x: list[Tensor] = []
    grad_scale = x.new_zeros(()) if ctx.scale is not None else scale.new_zeros(())
    grads_weight: list[Tensor] = []
    # The features' gradient first, and on its way while the centres' is made: where E need not be made twice for it.
    apart = need_features and need_weight and shards.shards > 1 and all(_has_terms(*call[:2]) for call in calls)
    backend = backends.load(plan.backend)

    def run(needs: backends.Needs) -> None:
        nonlocal grad_scale
        for problem, forward, upstream, classes in calls:
            of_panel = None if update is None else _update_of(update, shards, problem, classes)
            of_x, of_weight, of_scale = backend.backward(problem, forward, upstream, needs, of_panel)
            if needs.features:
                grads_x.append(of_x)
            if needs.weight:
                grads_weight.append(of_weight)
            if needs.scale:
                grad_scale = grad_scale + of_scale

    run(backends.Needs(need_features, need_weight and not apart, need_scale))
    scattered = None
    if need_features:
        grad_x = sum(grads_x[1:], grads_x[0]) if grads_x else torch.zeros_like(x)
        if means is not None and grads[3] is not None and shards.shard == 0:  # every shard has it: once is enough
            grad_x = grad_x + means.grad_features(grads[3][mine]).to(grad_x.dtype)
        scattered = shards.scatter_rows(grad_x, plan.rows)
    if apart:
        run(backends.Needs(False, True, False))
    grad_weight = None
    if need_weight and update is None:
        grad_weight = _grad_weight(plan, weight, [call[3] for call in calls], grads_weight)
    plan.differentiated()
    if need_scale:
        grad_scale = shards.sum_replicas_(shards.sum_(grad_scale.to(x.device))).to(scale.device)
    grad_features = None
    if scattered is not None:
        grad_features = (scattered.wait() * shards.world_size).to(features.dtype)
    return grad_features, grad_weight, grad_scale if need_scale else None


def _calls(
    plan: Plan, x: Tensor, scale: float | Tensor, saved: list[Tensor], upstream: backends.Upstream
) -> list[tuple[backends.Problem, backends.Forward, backends.Upstream, Tensor]]:
    """What the backward pass of each panel is given, and its classes."""
    calls, size = [], 4 + len(backends.Forward._fields)
    for first in range(0, len(saved), size):
        weight, labels, classes, factor, *out = saved[first : first + size]
        # By ‖x‖ once, as it does not depend on the classes.
        given = upstream._replace(row_factor=upstream.row_factor * factor, norm=None if first else upstream.norm)
        calls.append((plan.problem(x, weight, labels, scale), backends.Forward(*out), given, classes))
    return calls


def _update_of(update: Update, shards: ClassShards, problem: backends.Problem, classes: Tensor | None) -> Update:
    """The step of a panel's classes, whose gradients the replicas add up."""
    centres, width = problem.weight.shape
    blocks = None if shards.replicas == 1 else Blocks(centres, width, shards.sum_replicas_)
    K = problem.subcentres
    if classes is not None and K > 1:
        classes = (classes[:, None] * K + torch.arange(K, device=classes.device)).flatten()
    return replace(update, rows=classes, blocks=blocks)


class LocalRows(torch.autograd.Function):
    """This rank's rows of a vector of all ranks' rows: ``apply(vector, plan's shards, rows)``.

    Each rank goes on with its own; the gradient of the mean of what the ranks make of them comes back.
    """

    @staticmethod
    def forward(ctx: Any, vector: Tensor, shards: ClassShards, rows: Rows) -> Tensor:
        ctx.shards, ctx.rows = shards, rows
        return vector[rows.local_slice].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.shards.gather_local(grad, ctx.rows) / ctx.shards.world_size, None, None


def _gather(features: Tensor, labels: Tensor, plan: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features of this replica's rows in the accumulate dtype, and their labels."""
    shards, compute = plan.shards, plan.compute_dtype
    if shards.shards == 1:
        return features, labels
    if compute != torch.float16 or features.dtype == torch.float16:
        narrow = compute if compute.itemsize < features.dtype.itemsize else features.dtype
        x, labels = shards.gather_rows(features.to(narrow), labels, plan.rows)
        return x.to(dtype), labels
    # Past float16's range: rows go as halves of a power of two, which travels in the labels' low bits.
    largest = features.abs().amax(1) if features.shape[1] else features.new_zeros(len(features))
    exponent = torch.where(largest.isfinite(), torch.frexp(largest).exponent, 0).clamp_(-120, 120)
    scaled = torch.ldexp(features, -exponent[:, None]).to(torch.float16)
    x, packed = shards.gather_rows(scaled, labels * 256 + (exponent + 128), plan.rows)
    return torch.ldexp(x.to(dtype), (packed & 255)[:, None] - 128), packed >> 8


def _panels(labels: Tensor, all_labels: Tensor, weight: Tensor, plan: Plan) -> list[_Panel]:
    """What to compute with: the whole shard, what was drawn of it, or nothing where it has no class."""
    if plan.shards.classes == 0:
        return []
    sampling = plan.sampling
    if sampling is None:
        return [_Panel(weight, labels, None)]
    # Of the labels of all replicas, so that they draw the same.
    draw = draw_classes(all_labels, len(weight), sampling.size, sampling.seed, sampling.step)
    classes, slots = draw.classes, draw.labels[plan.rows.replica_slice]
    rows = weight.index_select(0, classes)
    if not sampling.corrected:
        return [_Panel(rows, slots, classes)]
    certain, others = draw.certain, sampling.size - draw.certain
    absent = slots.clamp(max=certain)  # where the target is in neither, it is past both
    # No target is among the others.
    elsewhere = torch.full_like(slots, others).masked_fill_(slots < 0, -1)
    return [
        _Panel(rows[:certain], absent, classes[:certain]),
        _Panel(rows[certain:], elsewhere, classes[certain:], draw.weight),
    ]


def _grad_weight(plan: Plan, weight: Tensor, classes: list[Tensor | None], grads: list[Tensor]) -> Tensor:
    """The centres' gradient, of their shape."""
    grad = torch.cat(grads) if len(grads) > 1 else grads[0] if grads else torch.zeros_like(weight)
    grad = grad.view(-1, *weight.shape[1:])
    plan.shards.sum_replicas_(grad)
    drawn = [each for each in classes if each is not None]
    if plan.sampling is None or not drawn:
        return grad
    return torch.zeros_like(weight).index_copy_(0, torch.cat(drawn), grad)


def _best(panels: list[_Panel], plan: Plan, x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest cosine of a negative and its class, the lowest of equals, over all shards."""
    if not plan.predict:
        return x.new_empty(0), torch.empty(0, dtype=torch.int64, device=x.device)
    shards, dtype = plan.shards, accumulate_dtype(plan.compute_dtype)
    best = x.new_full((len(x),), -math.inf, dtype=dtype)
    best_class = torch.full((len(x),), -1, device=x.device)
    for panel in panels:
        out = _out(panel)
        classes = out.best_class if panel.classes is None else panel.classes[out.best_class.clamp(min=0)]
        classes = torch.where(out.best_class < 0, -1, classes + shards.start)
        larger = (out.best > best) | ((out.best == best) & (classes < best_class))
        best, best_class = torch.where(larger, out.best, best), torch.where(larger, classes, best_class)
    everywhere = shards.maximum_(best.clone())
    # The largest of the negated classes is the lowest class; a shard that has not the best does not count.
    candidate = torch.where((best == everywhere) & (best_class >= 0), -best_class, -(1 << 62))
    found = -shards.maximum_(candidate)
    return everywhere, torch.where(found == 1 << 62, -1, found)


def _bounded(plan: Plan, scale: float | Tensor) -> bool:
    """Whether no rank can have a shift: decided by what is alike on all of them."""
    if isinstance(scale, Tensor):
        scale = math.inf if scale.device.type != "cpu" or scale.requires_grad else scale.item()
    return plan.normalize_features and scale <= BOUNDED_SCALE


def _has_terms(problem: backends.Problem, out: backends.Forward) -> bool:
    """Whether E is at hand for both gradients."""
    return out.kept.numel() >= len(problem.features) * len(problem.weight)


def _out(panel: _Panel) -> backends.Forward:
    assert panel.out is not None
    return panel.out
