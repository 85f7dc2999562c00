"""The base of both optimizers: a backward pass updates the centres, ``step()`` ends the step, and each follows the other."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..arguments import FLOATS
from ..backends.update import ELEMENTS, SGD, AdamW, Tally, Update
from ..functional import loss_of
from ..modules import TORN, AMSoftmaxLoss, Link
from ..sharded.module import ShardedAMSoftmaxLoss
from ..sharded.shards import is_initialized, local_part, world_size
from ..values import is_int, type_name


class FusedOptimizer(torch.optim.Optimizer):
    """What both optimizers share: the head, the order of backward passes and steps, and the state's dtype."""

    _step_supports_amp_scaling = True  # a GradScaler's step calls step(), with its factor as grad_scale

    def _attach(self, head: Any, state_dtype: Any, stochastic_rounding: Any, seed: Any, scaler: Any) -> None:
        dtype = head.weight.dtype
        if state_dtype is not None and state_dtype not in FLOATS:
            raise TypeError(f"state_dtype must be None, float64, float32, float16 or bfloat16, but it is {state_dtype}")
        if stochastic_rounding not in (None, True, False):
            raise TypeError(f"stochastic_rounding must be None or a bool, but it is {type_name(stochastic_rounding)}")
        if stochastic_rounding and torch.bfloat16 not in (dtype, state_dtype):
            raise ValueError(f"stochastic_rounding must be None or False for {dtype}: it rounds to bfloat16")
        if not is_int(seed) or not 0 <= seed < 1 << 62:
            raise ValueError(f"seed must be an int in [0, 2^62), but it is {seed!r}")
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler must be None or a torch.amp.GradScaler, but it is {type_name(scaler)}")
        self._head, self._scaler, self._seed, self._rounding = head, scaler, int(seed), stochastic_rounding
        self._given_state_dtype = state_dtype
        self._pending, self._graph_task = False, -1  # a backward pass has been made since step(), and which
        self._passed_by = False  # one that left the centres alone
        self._tally = Tally()
        head._centres_optimizer = Link(self)

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = self.param_groups[0]["params"][0]
        return weight

    @property
    def _state_dtype(self) -> torch.dtype:
        """float32 where float16 centres have it: a second moment of gradients is past float16's range."""
        dtype = self._weight.dtype
        return self._given_state_dtype or (torch.float32 if dtype == torch.float16 else dtype)

    @property
    def _stochastic(self) -> bool:
        return bool(self._weight.dtype == torch.bfloat16 if self._rounding is None else self._rounding)

    @property
    def skipped(self) -> int:
        """This rank's updates of single classes that were left out so far, as their gradient was not finite."""
        return self._tally.total()

    # What changes the centres is no part of a compiled graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def loss(self, head: AMSoftmaxLoss, features: Tensor, labels: Tensor, return_predictions: bool | str) -> Any:
        """The head's loss, whose backward pass updates its centres; the head's forward pass calls it."""
        return loss_of(features, head.weight, labels, head.loss_options(return_predictions), self)

    def agreement(self) -> tuple[Any, ...]:
        """What must be alike on all ranks of a sharded head."""
        group = {name: value for name, value in _numbers(self.param_groups[0]).items() if name != "params"}
        mine = (self._seed, str(self._state_dtype), self._stochastic, self._pending)
        return type(self).__name__, *mine, *(f"{name} {value}" for name, value in sorted(group.items()))

    def check(self, weight: Tensor) -> None:
        """That a forward pass is on the centres that are updated, and that these are whole.

        Raises:
            RuntimeError: they are not.
        """
        name, own = type(self).__name__, self._weight
        if self._head._torn:
            raise RuntimeError(TORN)
        if weight is not own:
            raise RuntimeError(f"the head's weight is another Parameter than {name} was made for: make it after the change")
        if is_initialized() and world_size() > 1 and not isinstance(self._head, ShardedAMSoftmaxLoss):
            raise RuntimeError(
                f"{name} would update this rank's centres by this rank's rows alone: take ShardedAMSoftmaxLoss, with a mesh "
                "of (ranks, 1) for the whole head on each rank"
            )
        if own._backward_hooks or getattr(own, "_post_accumulate_grad_hooks", None):
            raise RuntimeError(f"the head's weight has hooks for its gradient, and with {name} there is none: remove them")
        if len(self.param_groups) > 1:
            raise RuntimeError(f"{name} updates the head's weight alone: give other parameters to an optimizer of their own")
        for flag in ("maximize", "amsgrad"):
            if self.param_groups[0].get(flag):
                raise ValueError(f"{name} does not do {flag}, which the loaded state has switched on")
        states = [value for value in self.state.get(own, {}).values() if isinstance(value, Tensor) and value.dim() > 0]
        for each in states:
            if each.shape != own.shape or each.device != own.device:
                raise RuntimeError(f"{name}'s state has {list(each.shape)} on {each.device}, which is not the weight's")
        if not all(local_part(each).is_contiguous() for each in (own, *states)):
            raise RuntimeError(f"{name} takes contiguous centres and state: make a contiguous Parameter, then the optimizer")

    def check_turn(self, asked: bool) -> None:
        """That a backward pass may update the centres now, if it is ``asked`` to.

        Raises:
            RuntimeError: it must not. Nothing has been changed, unless the head was called twice in one backward pass.
        """
        name = type(self).__name__
        if self._head._torn:
            raise RuntimeError(TORN)
        if not asked:
            self._passed_by = True
            return
        if self._pending:
            if self._graph_task == torch._C._current_graph_task_id():
                self._head._torn = True
                raise RuntimeError(
                    f"the head was called twice in one backward pass, of which {name} has applied a part. {TORN}"
                )
            raise RuntimeError(
                f"a second backward pass before {name}.step(): the first one has updated the centres. Call step() after "
                "each backward pass; to accumulate gradients take an optimizer of torch.optim"
            )
        if self._head._centres_optimizer is None or self._head._centres_optimizer.found() is not self:
            raise RuntimeError(f"another optimizer was made for the head after this loss, which was {name}'s to update")
        if self._weight.grad is not None:
            raise RuntimeError(
                f"the head's weight has a gradient from elsewhere, which {name} cannot add to its own: take an optimizer of "
                "torch.optim where the weight has other uses in the loss, or clear it by zero_grad()"
            )
        if self._weight.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{name} cannot be captured in a CUDA graph, whose learning rate would stay the same")

    @contextmanager
    def updating(self, weight: Tensor) -> Iterator[Update]:
        """The step of one backward pass, of a loss on ``weight``, this rank's centres; after :meth:`check_turn`.

        Raises:
            RuntimeError: the centres are others than the loss's, and nothing is changed.
        """
        own = self._rows(self._weight).detach()
        if own.shape != weight.shape or own.data_ptr() != weight.data_ptr():
            raise RuntimeError(
                f"the head's weight was changed for another one since the loss was computed, which {type(self).__name__} "
                "would update: call the head again"
            )
        update = self._begin(1.0 if self._scaler is None else self._scaler.get_scale())
        try:
            yield update
        except BaseException:
            self._head._torn = self._tally.begun
            raise
        finally:
            # Kernels write where autograd does not see it.
            torch.autograd.graph.increment_version((update.weight, *update.state))
        self._pending, self._graph_task = True, torch._C._current_graph_task_id()

    def _rows(self, tensor: Tensor) -> Tensor:
        """This rank's part of the weight, of its gradient or its state: one centre a row."""
        return local_part(tensor).view(-1, tensor.shape[-1])

    def _begin(self, loss_scale: float) -> Update:
        """The next step, with state for it."""
        self._tally.begun = False
        group, names = self.param_groups[0], self._names()
        state = self.state[self._weight] if names or self._counts() else {}
        first = any(state.get(name) is None for name in names)
        for name in names if first else ():
            state[name] = torch.zeros_like(self._weight, dtype=self._state_dtype)
        step = 0
        if self._counts():
            step = int(state.get("step", 0)) + 1
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device="cpu")
        head = self._head
        return Update(
            self._rule(_numbers(group), first, step), self._rows(self._weight).detach(),
            tuple(self._rows(state[name]) for name in names), seed=self._seed if self._stochastic else None, step=step,
            class_start=head.shards.start * head.subcentres if isinstance(head, ShardedAMSoftmaxLoss) else 0,
            loss_scale=loss_scale,
            tally=self._tally,
        )  # fmt: skip

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """End the step that the backward pass has made; it must follow each. Returns what ``closure`` does, which is called
        first. A gradient from elsewhere alone is applied here.

        Raises:
            RuntimeError: the weight has a gradient beside the update that was made, or a GradScaler was used that this
                optimizer was not given: the centres have then had a step that they should not have.
        """
        name = type(self).__name__
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        scaled, factor = hasattr(self, "found_inf"), getattr(self, "grad_scale", None)  # as a GradScaler hands them over
        if self._head._torn:
            raise RuntimeError(TORN)
        if scaled and self._scaler is None and self._pending:
            self._forget_scaler()
            self._head._torn = True
            raise RuntimeError(
                f"a GradScaler's factor was in the gradient by which {name} updated the centres: give it the scaler, "
                f"{name}(head, ..., scaler=scaler), and load the centres anew"
            )
        if self._weight.grad is not None:
            if self._pending:
                self._forget_scaler()
                self._head._torn = True
                raise RuntimeError(
                    f"the head's weight has a gradient from elsewhere beside the update that {name} made: take an optimizer "
                    "of torch.optim where the weight has other uses in the loss, and load the centres anew"
                )
            self._apply(self._rows(self._weight.grad), 1.0 if factor is None else float(factor))
        elif self._passed_by and not self._pending:
            warnings.warn(
                f"{name}.step() has nothing to end: the backward pass was told its inputs, and left the centres alone. Call "
                "backward() without them",
                RuntimeWarning,
                stacklevel=2,
            )
        self._pending = self._passed_by = False
        return result

    def _apply(self, grad: Tensor, loss_scale: float) -> None:
        """One step by a gradient that is there, some classes at a time."""
        update = self._begin(loss_scale)
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        for first in range(0, len(grad), rows := max(ELEMENTS // max(grad.shape[1], 1), 1)):
            update.apply_(first, update.unscaled(grad[first : first + rows].to(dtype, copy=True)))

    def _forget_scaler(self) -> None:
        """A GradScaler takes back what it has handed over only where step() returns."""
        for attribute in ("grad_scale", "found_inf"):
            self.__dict__.pop(attribute, None)

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim``'s. RuntimeError after a backward pass was broken off."""
        if self._head._torn:
            raise RuntimeError(TORN)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's state or that of ``torch.optim``'s of the name; of any dtype into ``state_dtype``."""
        loaded = copy.copy(state_dict)
        super().load_state_dict(loaded)
        state = self.state.get(self._weight, {})
        for name in self._names():  # PyTorch takes the parameter's dtype: take the values from where they came
            if isinstance(state.get(name), Tensor) and state[name].dtype != self._state_dtype:
                source = next(iter(loaded["state"].values()))[name]
                state[name] = source.to(state[name].device, self._state_dtype, copy=True)
        self._pending = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"{type(self).__name__} belongs to its head and cannot be copied or pickled: save its state_dict()")

    def _names(self) -> tuple[str, ...]:
        """Of the tensors of state that the step needs."""
        raise NotImplementedError

    def _counts(self) -> bool:
        """Whether the step's number is part of the state."""
        raise NotImplementedError

    def _rule(self, group: dict[str, Any], first: bool, step: int) -> SGD | AdamW:
        raise NotImplementedError


def weight_of(head: Any) -> Tensor:
    if not isinstance(head, AMSoftmaxLoss):
        raise TypeError(f"head must be an AMSoftmaxLoss or a ShardedAMSoftmaxLoss, but it is {type_name(head)}")
    return head.weight


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options with tensors read; a scheduler may keep its learning rate in one."""
    return {
        name: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for name, value in group.items()
    }
