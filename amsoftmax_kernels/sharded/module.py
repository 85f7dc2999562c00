"""The head sharded over the classes as a module."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .. import backends, reference
from ..arguments import (
    WITH_MARGIN,
    canonical_labels,
    check_arguments,
    check_features,
    check_flag,
    compute_dtype,
)
from ..autograd import DEFAULT_SAVE_BYTES, beside, traits_of
from ..backends.subcentres import nearest
from ..functional import Vectors, loss_rows
from ..margins import Margin, as_margin, reduce_rows
from ..modules import AMSoftmaxLoss, HeadUpdater
from ..values import plain
from . import options
from . import shards as sharding
from .function import LocalRows, Plan, Sampling, ShardedFunction
from .initialization import draw_centres_
from .sampling import draw_size


class ShardedAMSoftmaxLoss(AMSoftmaxLoss):
    """:class:`AMSoftmaxLoss` with its classes sharded over ranks, each of which brings its own rows.

    The loss is that of all ranks' rows, the same number on every rank (``reduction="none"``: this rank's own rows, and the
    gradient is that of the mean over ranks of what each makes of its rows: of the mean over all rows if each takes the mean
    of equally many). Every rank must call it, and backpropagate the same function of it. The gradients are such that a
    backbone under DistributedDataParallel or FSDP, which average over ranks, trains as one process on the whole batch would;
    the head's own parameters have their whole gradient, and must not be wrapped. A margin object is evaluated on every rank
    for all rows: it must not draw random numbers. Batches may differ in size between ranks, or be empty.

    One all-gather of features (in the compute dtype) and labels, one all-reduce of two numbers a row, one
    reduce-scatter of the features' gradient: docs/sharded.md has the bytes.

    Args:
        embedding_dim, num_classes, scale, margin, subcentres, normalize_features, reduction, ignore_index,
            label_smoothing, interclass_filter, backend, save_bytes, std: as in :class:`AMSoftmaxLoss`; ``save_bytes`` a
            rank. A margin's or a scale's parameters are whole on every rank, and so is their gradient.
        mesh: a DeviceMesh: 1-d, the ranks to shard over; or 2-d, replicas × shards: the classes are sharded along the second
            dimension and the rows spread over both. None: all ranks of the default group; where there is none, one process
            has all classes, as in :class:`AMSoftmaxLoss`.
        sample_rate: the share of each rank's classes to compute with in training (PartialFC, An et al. 2021): every class of
            the batch among them, and others drawn anew each step, equally likely; of K classes at least B + 1, for B rows
            on all ranks, as each may be of a class of its own here. 1 takes all.
        sampling_correction: multiply the drawn negatives' terms so that the softmax's denominator estimates that over
            all classes without bias (the rate is then that of the others: B + rate·(K − B) are drawn); otherwise it is
            that of the drawn classes, as in PartialFC.
        equal_batches: promise that all ranks' batches are of one size. Sizes are then not exchanged after the first call,
            which on a GPU spares the host waiting for it (unless the process group also has a CPU backend).
        seed: of the centres' first values and of the draws; None takes it from PyTorch's generator on the first rank. The
            same centres are drawn whatever the number of ranks.
        device, dtype: of the centres.

    Attributes:
        weight: DTensor Parameter ``[C, D]``, ``Shard(0)``: only this rank's classes are held; ``[C, K, D]`` with
            ``subcentres=K``, so that ranks hold whole classes (either head loads the other's). Without a process group a
            plain Parameter as :class:`AMSoftmaxLoss`'s. Initialize it with ``std`` or :meth:`set_centres`: ``torch.nn.init``
            draws the same on each rank of a CPU mesh. For one optimizer of these and plain parameters see
            :func:`amsoftmax_kernels.optim.mixed_parameters`.

    Raises:
        TypeError, ValueError: as :class:`AMSoftmaxLoss`. An argument that is wrong on one rank, or an option that is not
            alike on all, raises on all of them in a call, with ``equal_batches`` in the first one; in a later one, and
            at construction, it raises on that rank alone, and the others wait.
        RuntimeError: in a collective operation, when another rank has died or is late; in the first call, where the head
            was made before the process group.

    Example:
        Without a process group one process has all classes; docs/sharded.md has a script for several.

        >>> import torch
        >>> from amsoftmax_kernels import ShardedAMSoftmaxLoss
        >>> head = ShardedAMSoftmaxLoss(embedding_dim=8, num_classes=100, sample_rate=0.5, seed=0)
        >>> loss = head(torch.randn(16, 8, requires_grad=True), torch.randint(100, (16,)))  # float32, the same on every rank
        >>> loss.backward()
        >>> int(head.weight.grad.any(1).sum())  # the classes that were drawn
        50
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        scale: float | Tensor = 30.0,
        margin: float | Tensor | Margin = 0.35,
        *,
        subcentres: int = 1,
        normalize_features: bool = True,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        interclass_filter: float | None = None,
        backend: str | None = None,
        save_bytes: int | None = None,
        std: float | None = None,
        mesh: DeviceMesh | None = None,
        sample_rate: float = 1.0,
        sampling_correction: bool = False,
        equal_batches: bool = False,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sample_rate, seed = plain(sample_rate), plain(seed)
        options.check(mesh, sample_rate, seed, backend, device)
        for name, flag in (("sampling_correction", sampling_correction), ("equal_batches", equal_batches)):
            check_flag(name, flag)
        self._mesh, self._seed, self._agreed_once = mesh, seed, False
        self._draws = 0  # how often the centres were drawn from the seed
        self._counted_in = -1  # the backward pass in which the last step was counted
        self.sample_rate = sample_rate
        options.check_whole_mean(label_smoothing, sample_rate)
        super().__init__(
            embedding_dim, num_classes, scale, margin,
            subcentres=subcentres, normalize_features=normalize_features, reduction=reduction, ignore_index=ignore_index,
            label_smoothing=label_smoothing, interclass_filter=interclass_filter, backend=backend, save_bytes=save_bytes,
            std=std, device=device if mesh is None or device is not None else mesh.device_type, dtype=dtype,
        )  # fmt: skip
        self.sampling_correction, self.equal_batches = sampling_correction, equal_batches

    check_alone = staticmethod(sharding.check_alone)

    def _empty_weight(self, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
        where = torch.get_default_device() if device is None else torch.device(device)
        mesh = self._mesh
        if mesh is None and sharding.is_initialized():
            mesh = sharding.default_mesh(where)
        self.shards = sharding.ClassShards(self.num_classes, mesh)
        self.sampling_state: Tensor
        if self.sample_rate < 1:
            # Seed and steps taken: in the checkpoint, so that a run that is resumed draws what it would have drawn.
            self.register_buffer("sampling_state", torch.zeros(2, dtype=torch.int64, device=where))
        local = torch.empty(self.shards.classes * self.subcentres, self.embedding_dim, device=where, dtype=dtype)
        return self.shards.distribute(local if self._flat else local.unflatten(0, (-1, self.subcentres)))

    @property
    def _flat(self) -> bool:
        """Whether ``weight`` has a centre a row; over a mesh it has a class a row, as that is what is dealt out to ranks."""
        return self.subcentres == 1 or self.shards.mesh is None

    def _local_centres(self) -> Tensor:
        return sharding.local_part(self.weight).view(-1, self.embedding_dim)

    def _own_slice(self) -> slice:
        """This rank's centres among all ``[C·K, D]``."""
        return slice(self.shards.start * self.subcentres, self.shards.stop * self.subcentres)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *rest: Any) -> None:
        """Of whole centres, as :class:`AMSoftmaxLoss` saves them, this rank's part is taken."""
        whole: Any = state_dict.get(f"{prefix}weight")
        mesh = self.shards.mesh
        shapes = (self.weight.shape, (self.num_classes * self.subcentres, self.embedding_dim))  # a class or a centre a row
        if mesh is not None and type(whole) in (Tensor, nn.Parameter) and tuple(whole.shape) in shapes:
            whole = whole.reshape(self.weight.shape)
            where, dtype = self.weight.device, self.weight.dtype
            if local_metadata.get("assign_to_params_buffers", False):  # in the place of this head's, which may be on "meta"
                dtype = whole.dtype
                if where.type == "meta":
                    where = whole.device if whole.device.type == mesh.device_type else torch.device(mesh.device_type)
            local = whole.detach()[self.shards.start : self.shards.stop].to(where, dtype, copy=True)
            state_dict[f"{prefix}weight"] = self.shards.distribute(local)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _own_rows(self, centres: Tensor) -> Tensor:
        if isinstance(centres, DTensor) and self.subcentres == 1:
            centres = centres.redistribute(self.shards.mesh, self.shards.placements)
            return sharding.local_part(centres)
        return sharding.whole(centres)[self._own_slice()]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the centres anew, the same whatever the number of ranks. Every rank must call it."""
        local = self._local_centres()
        if self._seed is None:
            seed = int(torch.randint(1 << 62, (), device="cpu"))
            self._seed = self.shards.broadcast_int(seed, local.device)
        if local.is_meta:
            return
        if self.sample_rate < 1:
            self.sampling_state.copy_(torch.tensor([self._seed, 0]))
        draw_centres_(local.view(-1, self.subcentres, self.embedding_dim), self.shards, self.std, self._seed, self._draws)
        self._draws += 1

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> tuple[str, ...]:
        """What DistributedDataParallel asks the module for that it is given."""
        if self.shards.mesh is not None:
            raise TypeError(
                "a sharded head is not to be wrapped in DistributedDataParallel: each rank holds other classes, and their "
                "gradients are whole. Wrap the backbone alone; docs/sharded.md has a model that contains the head"
            )
        return ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.shards.mesh is not None:
            raise TypeError(
                "a sharded head cannot be pickled, as it holds its process group: save head.state_dict(), with "
                "torch.distributed.checkpoint where it is to be loaded on another number of ranks"
            )
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedAMSoftmaxLoss:
        made = memo[id(self)] = type(self).__new__(type(self))  # as pickling would, which may not be
        made.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        return made

    def forward(self, features: Tensor, labels: Tensor, return_predictions: bool | Literal["with_margin"] = False) -> Any:
        """The loss over all ranks' rows, of this rank's ``features [b, D]`` with ``labels [b]`` in ``[0, C)``.

        With ``return_predictions`` also the predicted classes of this rank's rows, of those drawn where they are drawn.
        """
        if self.shards.mesh is None:
            sharding.check_alone()
        if self.shards.mesh is None and (self.sample_rate == 1 or not self.training):
            return super().forward(features, labels, return_predictions)  # type: ignore[arg-type]
        return self._sharded(features, labels, return_predictions)

    # Collectives and what they wait for are no part of a compiled graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _sharded(self, features: Tensor, labels: Tensor, return_predictions: bool | str) -> Any:
        shards = self.shards
        error: Exception | None = None
        batch, agreed = 0, dict[str, Any]()
        try:
            backend, canonical = self._checked(features, labels, return_predictions)
            batch, agreed = len(features), options.agreed(self, features, backend, return_predictions)
        except Exception as caught:  # of any kind: the other ranks must not wait for this one
            error = caught
        # Once even where batches are equal: the ranks' options could differ.
        if not (self.equal_batches and self._agreed_once):
            rows = shards.agree_on_rows(batch, agreed, error, self.weight.device)
            if self.equal_batches and len({size for sizes in rows.sizes for size in sizes}) > 1:
                raise ValueError(f"equal_batches promises batches of one size on every rank, but they are {rows.sizes}")
            self._agreed_once = True
        elif error is not None:
            raise error
        if self.equal_batches:
            rows = shards.equal_rows(batch)

        scale = beside(self.scale, features.device)
        local = sharding.local_part(self.weight)
        if self.subcentres > 1:
            local = local.view(-1, self.subcentres, self.embedding_dim)
        grad = torch.is_grad_enabled()
        differentiated = grad and (features.requires_grad or local.requires_grad or getattr(scale, "requires_grad", False))
        sampling = self._sampling(rows)
        anchor = None
        updater = self._updater if grad and local.requires_grad else None
        if updater is not None:
            anchor, local = torch.zeros((), device=local.device, requires_grad=True), local.detach()
        save_bytes = DEFAULT_SAVE_BYTES if self.save_bytes is None else min(self.save_bytes, (1 << 63) - 1)
        plan = Plan(
            shards, rows, self.normalize_features, compute_dtype(features, self.weight),
            math.inf if self.interclass_filter is None else float(self.interclass_filter),
            save_bytes if differentiated else 0, bool(return_predictions), backend, sampling, self._count_step, updater,
            self.subcentres, self.label_smoothing > 0,
        )  # fmt: skip
        log_z, cosine, norm, mean, everyone, best, best_class = ShardedFunction.apply(  # type: ignore[no-untyped-call]
            features, canonical, local, scale, anchor, plan
        )
        each, psi = loss_rows(
            Vectors(log_z, cosine, norm, mean), everyone, self.num_classes, scale if self.normalize_features else norm,
            as_margin(self.margin), self.label_smoothing,
        )  # fmt: skip
        loss = reduce_rows(each, everyone, self.reduction)
        if self.reduction == "none":
            loss = LocalRows.apply(loss, shards, rows)  # type: ignore[no-untyped-call]
        if not return_predictions:
            return loss
        start = rows.replica_slice.start
        mine = slice(rows.local_slice.start - start, rows.local_slice.stop - start)
        t = (psi if return_predictions == WITH_MARGIN else cosine).detach()[rows.local_slice]
        found = torch.where(t >= best[mine], canonical, best_class[mine])
        return loss, found.masked_fill(t.isnan() | (canonical < 0), -1)

    def _checked(self, features: Tensor, labels: Tensor, return_predictions: bool | str) -> tuple[str, Tensor]:
        """The backend's name, and labels as it takes them, once everything has been checked."""
        check_arguments(features, self._described_weight(), labels, self.loss_options(return_predictions))
        options.check_whole_mean(self.label_smoothing, self.sample_rate)
        filtered = self.interclass_filter is not None
        traits = traits_of(
            features, self.weight, self.scale, self.normalize_features, filtered, bool(return_predictions), self.subcentres
        )
        backend = backends.choose(self.backend, traits)
        if backend == "reference":
            raise ValueError("backend 'reference' is the formula in one process: it cannot be sharded")
        if (updater := self._updater) is not None and torch.is_grad_enabled():
            updater.check(self.weight)
        return backend, canonical_labels(labels, self.num_classes, self.ignore_index)

    @property
    def _updater(self) -> HeadUpdater | None:
        """The optimizer that updates the centres in the backward pass, where there is one."""
        return None if self._centres_optimizer is None else self._centres_optimizer.found()

    def _described_weight(self) -> Tensor:
        """The centres ``[C·K, D]`` as far as arguments are checked against them: shape, dtype and device."""
        if self._flat:
            return self.weight
        stand_in = self._local_centres().new_empty(1, 1)
        return stand_in.expand(self.num_classes * self.subcentres, self.embedding_dim)

    def _sampling(self, rows: sharding.Rows) -> Sampling | None:
        classes = self.shards.classes
        if self.sample_rate == 1 or not self.training or classes == 0:
            return None
        if options.backward_pass() == self._counted_in != -1:
            raise RuntimeError(
                "sample_rate: this call is recomputed in a backward pass (activation checkpointing) that has already been "
                "through another call of the head, and would not draw the same: call a sampled head once a backward pass"
            )
        size = draw_size(self.sample_rate, classes, sum(rows.per_replica), self.sampling_correction)
        if size >= classes:
            return None
        seed, step = self.sampling_state.unbind()
        # Each shard draws its own, and its replicas the same.
        seed = seed + self.shards.start
        return Sampling(size, seed, step, self.sampling_correction)

    def _count_step(self) -> None:
        """A backward pass has been made: the next forward pass draws anew, and one that is run again does not."""
        if self.sample_rate < 1 and self.training:
            self.sampling_state[1] += 1
            self._counted_in = options.backward_pass()

    def cosine(self, features: Tensor) -> Tensor:
        """Cosines ``[b, C]`` of this rank's ``features [b, D]`` to every class; every rank must call it.

        Gathers all C×D centres on each rank: for evaluation with few classes.
        """
        weight = sharding.whole(self.weight)
        weight = weight if self._flat else weight.flatten(0, 1)
        check_features(features, weight)
        return reference.cosine(features, weight, self.subcentres)

    def subcentre_sizes(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """As :meth:`AMSoftmaxLoss.subcentre_sizes`, of this rank's classes and all ranks' samples."""
        return self.shards.sum_replicas_(super().subcentre_sizes(batches))

    @torch.no_grad()
    def _nearest_centres(self, features: Tensor, labels: Tensor) -> Tensor:
        shards = self.shards
        if shards.mesh is None:
            sharding.check_alone()
            return super()._nearest_centres(features, labels)
        error: Exception | None = None
        try:
            labels = self._checked(features, labels, False)[1]
        except Exception as caught:  # of any kind: the other ranks must not wait for this one
            error = caught
        agreed = {"D": features.shape[-1:], "features.dtype": features.dtype} if error is None else {}
        rows = shards.agree_on_rows(0 if error else len(features), agreed, error, self.weight.device)
        features, labels = shards.gather_rows(features, labels, rows)
        if shards.classes == 0:
            return torch.zeros_like(labels)  # one past the last
        centres = nearest(features, self._local_centres(), shards.local_labels(labels), self.subcentres)
        return centres.masked_fill_(centres < 0, len(self._local_centres()))

    def keep_largest_subcentres(self, sizes: Tensor) -> None:
        """As :meth:`AMSoftmaxLoss.keep_largest_subcentres`; every rank must call it with the sizes of its own classes."""
        state: Any = getattr(self, "sampling_state", None)
        super().keep_largest_subcentres(sizes)
        if state is not None:  # the draws go on
            self.get_buffer("sampling_state").copy_(state)

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        if self.shards.mesh is not None:
            parts.append(f"classes {self.shards.start} to {self.shards.stop} of {self.num_classes} on this rank")
        parts += [] if self.sample_rate == 1 else [f"sample_rate={self.sample_rate}"]
        return ", ".join(parts)
