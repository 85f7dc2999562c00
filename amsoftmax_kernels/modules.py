"""The head as a module: the class centres, and the loss on them."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor, nn

from . import backends, reference
from .arguments import (
    FLOATS,
    LossOptions,
    canonical_labels,
    check_arguments,
    check_features,
    check_margin,
    check_options,
    check_scale,
    check_size,
)
from .autograd import Updater
from .backends.subcentres import nearest
from .functional import loss_of
from .margins import Margin
from .values import is_number, plain, type_name

TORN = (
    "a backward pass was broken off while it updated the centres: some of them have had their step, others have not. Load "
    "centres and optimizer from a checkpoint"
)


class HeadUpdater(Updater, Protocol):
    """An optimizer that updates a head's centres."""

    def agreement(self) -> Any:
        """What must be alike on all ranks of a sharded head."""

    def loss(
        self, head: AMSoftmaxLoss, features: Tensor, labels: Tensor, return_predictions: bool | str
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The head's loss, whose backward pass is given to :meth:`updating`."""


class Link:
    """A head's way to the optimizer that updates its centres in the backward pass; a copy of the head has none."""

    def __init__(self, optimizer: HeadUpdater) -> None:
        self._optimizer = weakref.ref(optimizer)

    def found(self) -> HeadUpdater | None:
        """The optimizer, while there is one."""
        return self._optimizer()

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return _nothing, ()


def _nothing() -> None: ...


class AMSoftmaxLoss(nn.Module):
    """Class centres and the AM-Softmax loss: takes the place of ``nn.Linear`` and ``nn.CrossEntropyLoss`` together.

    Args:
        embedding_dim: D.
        num_classes: C.
        scale: s, a positive float or a 0-d tensor; an ``nn.Parameter`` is learned (nothing but the loss keeps it positive).
        margin: m, a float, a ``[C]`` tensor, or a margin object; an ``nn.Parameter`` or an ``nn.Module`` is registered
            here, and so moved, saved and trained with the head. A smaller margin always lowers the loss: one that is
            learned needs a term in the loss that holds it up. Under ``torch.compile`` a scale or a margin that changes from
            step to step is to be a tensor, a buffer here, changed in place (``head.scale.fill_(20.0)``): each number
            compiles anew.
        subcentres: K, centres a class; :meth:`subcentre_sizes` and :meth:`keep_largest_subcentres` leave one afterwards.
        normalize_features, reduction, ignore_index, label_smoothing, interclass_filter, backend, save_bytes: as in
            :func:`am_softmax_loss`.
        std: standard deviation of the centres' first values; None: 1/√D, for norms near 1.
        device, dtype: of the centres.

    DistributedDataParallel takes it like any module, beside the backbone or alone; one whose parameters all are frozen
    (``requires_grad_(False)``) has no gradient to exchange and is not to be wrapped.

    Attributes:
        weight: Parameter ``[C, D]``, drawn from a normal distribution; ``[C·K, D]`` with ``subcentres=K``, a class's K
            together.

    Raises:
        TypeError, ValueError: as :func:`am_softmax_loss`, at construction where the argument is given here.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import AMSoftmaxLoss
        >>> head = AMSoftmaxLoss(embedding_dim=8, num_classes=100, scale=30.0, margin=0.35)
        >>> features, labels = torch.randn(16, 8, requires_grad=True), torch.randint(100, (16,))
        >>> loss, predictions = head(features, labels, return_predictions=True)  # float32 0-d, int64 [16]
        >>> loss.backward()
        >>> head
        AMSoftmaxLoss(embedding_dim=8, num_classes=100, scale=30.0, margin=0.35)
        >>> head.cosine(features).shape
        torch.Size([16, 100])
    """

    _centres_optimizer: Link | None = None  # set by an optimizer of amsoftmax_kernels.optim that updates the centres
    subcentres: int = 1  # this and the next: of a head that was pickled before there were such
    label_smoothing: float = 0.0
    _torn = False  # its backward pass was broken off: some centres have had their step, others have not

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        embedding_dim, num_classes = check_size("embedding_dim", embedding_dim), check_size("num_classes", num_classes)
        given = LossOptions(
            scale, margin, subcentres, normalize_features, reduction, ignore_index, label_smoothing, interclass_filter,
            backend=backend, save_bytes=save_bytes,
        ).plain()  # fmt: skip
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"dtype must be float64, float32, float16 or bfloat16, but it is {dtype}")
        check_scale(given.scale)
        check_margin(given.margin, num_classes)
        check_options(given)
        if std is not None and not (is_number(std := plain(std)) and 0 < std < math.inf):
            raise ValueError(f"std must be None or a positive float, but it is {std!r}")
        backends.check_available(backend)
        self.std: float = embedding_dim**-0.5 if std is None else float(std)
        self.embedding_dim, self.num_classes, self.subcentres = embedding_dim, num_classes, given.subcentres
        self.normalize_features, self.reduction, self.ignore_index = normalize_features, reduction, given.ignore_index
        self.label_smoothing = float(given.label_smoothing)
        self.interclass_filter, self.backend, self.save_bytes = given.interclass_filter, backend, given.save_bytes
        self.weight = nn.Parameter(self._empty_weight(device, dtype))
        self.scale: float | Tensor
        self.margin: float | Tensor | Margin
        for name, value in (("scale", given.scale), ("margin", given.margin)):
            # Like any module's: a plain tensor becomes a buffer, a Parameter or a Module registers itself.
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                if value.requires_grad:
                    raise ValueError(
                        f"{name} must be an nn.Parameter to be learned, but it is a plain tensor that requires grad"
                    )
                self.register_buffer(name, value.detach().clone().to(device=device))
            else:
                if isinstance(value, nn.Module) and device is not None and torch.device(device).type != "meta":
                    value.to(device)  # its buffers: a margin's state
                setattr(self, name, value)
        self.reset_parameters()

    def _empty_weight(self, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
        return torch.empty(self.num_classes * self.subcentres, self.embedding_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the centres anew, from a normal distribution of standard deviation ``std``."""
        nn.init.normal_(self.weight, std=self.std)

    @torch.no_grad()
    def set_centres(self, centres: Tensor) -> None:
        """Copy ``centres [C, D]`` into ``weight``; every rank of a sharded head is given all of them, and keeps its own.

        With ``subcentres=K`` they are ``[C·K, D]``, or ``[C, K, D]``.

        Raises:
            TypeError: ``centres`` is no floating-point tensor.
            ValueError: its shape is another.
        """
        if not isinstance(centres, Tensor) or not centres.is_floating_point():
            raise TypeError(f"centres must be a floating-point Tensor, but it is {type_name(centres)}")
        if self._has_a_class_a_row(centres):
            centres = (centres.full_tensor() if hasattr(centres, "full_tensor") else centres).flatten(0, 1)
        expected = [self.num_classes * self.subcentres, self.embedding_dim]
        if list(centres.shape) != expected:
            name = "[C, D]" if self.subcentres == 1 else "[C·K, D]"
            raise ValueError(f"centres must have shape {name} = {expected}, but it has {list(centres.shape)}")
        self._local_centres().copy_(self._own_rows(centres))
        self._torn = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        found: Any = state_dict.get(f"{prefix}weight")
        if self.weight.dim() == 2 and self._has_a_class_a_row(found):
            state_dict[f"{prefix}weight"] = found.flatten(0, 1)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._torn = self._torn and f"{prefix}weight" not in state_dict

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._torn:
            warnings.warn(f"{prefix}weight: {TORN}", RuntimeWarning, stacklevel=3)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _has_a_class_a_row(self, centres: Any) -> bool:
        """Whether these are sub-centres as a sharded head's weight has them: ``[C, K, D]``."""
        shape = (self.num_classes, self.subcentres, self.embedding_dim)
        return isinstance(centres, Tensor) and self.subcentres > 1 and tuple(centres.shape) == shape

    def _own_rows(self, centres: Tensor) -> Tensor:
        """Those of ``centres [C·K, D]`` that this process holds."""
        return centres

    def _local_centres(self) -> Tensor:
        """The centres that this process holds, one a row, as a view of ``weight``."""
        return self.weight

    def subcentre_sizes(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """How many of the samples are nearest to each of their class's K centres: ``[C, K]`` int64, on the centres' device.

        Args:
            batches: pairs of features ``[B, D]`` and labels ``[B]``, of the whole training set for what follows in
                :meth:`keep_largest_subcentres`. Every rank of a sharded head brings as many batches, of any sizes, and is
                given the sizes of its own classes, of all ranks' samples.

        Raises:
            TypeError, ValueError: as a call of the head.
        """
        sizes = torch.zeros(self._local_centres().shape[0], dtype=torch.int64, device=self.weight.device)
        for features, labels in batches:
            sizes += torch.bincount(self._nearest_centres(features, labels), minlength=len(sizes) + 1)[:-1]
        return sizes.view(-1, self.subcentres)

    @torch.no_grad()
    def _nearest_centres(self, features: Tensor, labels: Tensor) -> Tensor:
        """Of each row the nearest of its class's centres, or one past the last where it has none here."""
        given = LossOptions(subcentres=self.subcentres, ignore_index=self.ignore_index)
        check_arguments(features, self.weight, labels, given)
        labels = canonical_labels(labels, self.num_classes, self.ignore_index)
        centres = nearest(features, self.weight, labels, self.subcentres)
        return centres.masked_fill_(centres < 0, len(self.weight))

    @torch.no_grad()
    def keep_largest_subcentres(self, sizes: Tensor) -> None:
        """Leave each class the centre that most samples are nearest to, and the head one centre a class.

        As the sub-centre paper does (Deng et al. 2020): most of a class's clean samples lie at one centre, wrongly labelled
        and hard ones at the others. ``weight`` is another Parameter afterwards: make the optimizer after this call.

        Args:
            sizes: ``[C, K]`` of :meth:`subcentre_sizes`; of equal ones the first counts. On a sharded head each rank
                gives those of its own classes.

        Raises:
            TypeError, ValueError: ``sizes`` is no integer tensor, or of another shape.

        Example:
            >>> import torch
            >>> from amsoftmax_kernels import AMSoftmaxLoss
            >>> head = AMSoftmaxLoss(embedding_dim=8, num_classes=100, subcentres=3)
            >>> batches = [(torch.randn(16, 8), torch.randint(100, (16,))) for _ in range(4)]
            >>> sizes = head.subcentre_sizes(batches)
            >>> sizes.shape, int(sizes.sum())
            (torch.Size([100, 3]), 64)
            >>> head.keep_largest_subcentres(sizes)
            >>> head
            AMSoftmaxLoss(embedding_dim=8, num_classes=100, scale=30.0, margin=0.35)
        """
        centres = self._local_centres().detach()
        groups = centres.unflatten(0, (-1, self.subcentres))
        if not isinstance(sizes, Tensor) or sizes.dtype == torch.bool or sizes.is_floating_point() or sizes.is_complex():
            raise TypeError(f"sizes must be an integer Tensor, but it is {type_name(sizes)}")
        if sizes.shape != groups.shape[:2]:
            raise ValueError(f"sizes must have shape [C, K] = {list(groups.shape[:2])}, but it has {list(sizes.shape)}")
        largest = sizes.to(centres.device).max(1).indices
        kept = groups[torch.arange(len(groups), device=centres.device), largest]
        self.subcentres, requires_grad = 1, self.weight.requires_grad
        self.weight = nn.Parameter(self._empty_weight(centres.device, centres.dtype), requires_grad=requires_grad)
        self._local_centres().copy_(kept)

    @overload
    def forward(self, features: Tensor, labels: Tensor, return_predictions: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(
        self, features: Tensor, labels: Tensor, return_predictions: Literal[True, "with_margin"]
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, features: Tensor, labels: Tensor, return_predictions: bool | Literal["with_margin"] = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of ``features [B, D]`` with ``labels [B]``; with ``return_predictions`` also the predicted classes.

        Shapes and dtypes of both are those of :func:`am_softmax_loss`.
        """
        if self._centres_optimizer is not None and (updater := self._centres_optimizer.found()) is not None:
            return updater.loss(self, features, labels, return_predictions)
        return loss_of(features, self.weight, labels, self.loss_options(return_predictions))

    def loss_options(self, return_predictions: bool | str = False) -> LossOptions:
        """What :func:`am_softmax_loss` is given beside the tensors."""
        return LossOptions(
            self.scale, self.margin, self.subcentres, self.normalize_features, self.reduction, self.ignore_index,
            self.label_smoothing, self.interclass_filter, return_predictions, self.backend, self.save_bytes,
        )  # fmt: skip

    def cosine(self, features: Tensor) -> Tensor:
        """Cosines ``[B, C]`` of ``features [B, D]`` to every class, float32 (float64 for float64), differentiable.

        Holds all B×C of them: for evaluation with few classes.
        """
        check_features(features, self.weight)
        return reference.cosine(features, self.weight, self.subcentres)

    def extra_repr(self) -> str:
        parts = [f"embedding_dim={self.embedding_dim}, num_classes={self.num_classes}"]
        names = ("scale", "margin") if self.normalize_features else ("margin",)  # where ‖x‖ takes the place of s
        parts += [f"{name}={_described(value)}" for name in names if not isinstance(value := getattr(self, name), nn.Module)]
        parts += [] if self.subcentres == 1 else [f"subcentres={self.subcentres}"]
        parts += [] if self.normalize_features else ["normalize_features=False"]
        parts += [] if self.label_smoothing == 0 else [f"label_smoothing={self.label_smoothing}"]
        parts += [] if self.interclass_filter is None else [f"interclass_filter={self.interclass_filter}"]
        return ", ".join(parts)


def _described(value: object) -> str:
    """A scale or margin in a word; one that is a Module is listed as a child."""
    if isinstance(value, Tensor):
        return f"{type(value).__name__}{list(value.shape)}"
    return str(value) if isinstance(value, (int, float)) else str(getattr(value, "__name__", value))
