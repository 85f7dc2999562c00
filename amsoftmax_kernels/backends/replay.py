"""What a function asks of a device, noted once and repeated with other addresses: for problems that the host is slower at.

On ten thousand classes a step's kernels take some 60 µs; to decide on their arguments takes longer. That depends on nothing
but the layout of the tensors and on plain values. Together they are the key under which the sequence of buffers, of launches
and of PyTorch's operators is remembered: like a CUDA graph, but the addresses may change.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..arguments import no_autocast

MAX_PROGRAMS = 256  # remembered for a function; each takes some 20 kB
_ALIGNMENT = 16  # bytes: kernels are compiled for addresses that are multiples of it, or not
_SPACING = 512  # bytes between buffers of one allocation, as CUDA's allocator has it
_BUFFERS = frozenset({"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"})
_local = threading.local()
# PyTorch keeps by process whether any mode is entered: threads that enter and leave across one another would leave it so.
_noting = threading.Lock()

# A step of a program, given all its tensors and their addresses, of which it may fill in some, and the stream.
Step = Callable[[list[Any], list[int], int], None]


class Replayed:
    """``function`` of tensors and plain values, with the same results: repeated from the third call with a key on.

    The first call is left alone: a batch of a size of its own would be noted for nothing.

    Args:
        function: positional arguments, the first a tensor on the device; returns a tuple of tensors. It may read no tensor's
            value, nor anything else that changes, beside what ``consider`` returns.
        consider: of the same arguments; what joins the key (their devices are not in it), None to leave the call alone.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], consider: Callable[..., Hashable | None]) -> None:
        self.function, self._consider = function, consider
        self._programs: dict[Hashable, Program | None] = {}  # None where it cannot be repeated
        self._seen: set[Hashable] = set()

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        considered = self._consider(*arguments)
        if considered is None:
            return self.function(*arguments)
        parts: list[Any] = [considered]
        tensors: list[Tensor] = []
        addresses: list[int] = []
        for each in arguments:
            if isinstance(each, Tensor):
                address = each.data_ptr()
                parts += each.shape, each.stride(), each.dtype, address % _ALIGNMENT
                tensors.append(each)
                addresses.append(address)
            else:
                parts.append(each)
        key = tuple(parts)
        program = self._programs.get(key)
        if program is not None:
            return program(tensors, addresses)
        if key not in self._seen:
            if len(self._seen) >= MAX_PROGRAMS:
                self.forget()
            self._seen.add(key)
        elif key not in self._programs and _noting.acquire(blocking=False):
            try:
                with Recorder(tensors) as recorder:
                    result = self.function(*arguments)
                self._programs[key] = recorder.program(result)
            finally:
                _noting.release()
            return result
        return self.function(*arguments)

    def forget(self) -> None:
        self._seen.clear()
        self._programs.clear()


class Program:
    """Steps on given tensors, buffers and what the steps themselves make, each in its place; and what is returned."""

    def __init__(
        self, steps: list[Step], places: int, made: int, buffers: dict[int, Tensor], used: set[int], results: list[View]
    ) -> None:
        """``made``: of them by steps. ``buffers`` are like those to make; unless ``used``, it is addresses that matter."""
        self._steps, self._places, self._results = steps, places, results
        self._may_cast = made > 0  # autocast is only for operators without an out=, and to leave it takes some µs
        self._tensors, self._constants, self._addressed = [], [], []
        self._bytes = 0
        for place, like in buffers.items():
            if like.numel() == 0:  # nothing is ever written to it
                with torch.inference_mode(False):  # or a backward pass could not have it
                    self._constants.append((place, torch.empty_like(like)))
            elif place in used:
                self._tensors.append((place, like.shape, like.stride(), like.dtype, like.device))
            else:
                self._addressed.append((place, self._bytes))
                self._bytes += -(-like.untyped_storage().nbytes() // _SPACING) * _SPACING

    def __call__(self, tensors: list[Any], addresses: list[int]) -> tuple[Tensor, ...]:
        device, more = tensors[0].device, self._places - len(tensors)
        tensors += [None] * more
        addresses += [0] * more
        for place, tensor in self._constants:
            tensors[place] = tensor
        for place, size, stride, dtype, where in self._tensors:
            tensor = torch.empty_strided(size, stride, dtype=dtype, device=where)
            tensors[place], addresses[place] = tensor, tensor.data_ptr()
        if self._bytes:
            memory = torch.empty(self._bytes, dtype=torch.uint8, device=device)
            first = memory.data_ptr()
            for place, offset in self._addressed:
                addresses[place] = first + offset
        with no_autocast(device) if self._may_cast else nullcontext(), on_device(device):
            stream = current_stream(device)
            for step in self._steps:
                step(tensors, addresses, stream)
        return tuple([tensors[each.place] if each.layout is None else each(tensors) for each in self._results])


class View:
    """A tensor among a program's: the one in a place, or a part of it."""

    def __init__(self, place: int, layout: tuple[Any, Any, Any] | None) -> None:
        self.place, self.layout = place, layout

    def __call__(self, tensors: list[Any]) -> Tensor:
        tensor: Tensor = tensors[self.place]
        if self.layout is None:
            return tensor
        size, stride, offset = self.layout
        return tensor.as_strided(size, stride, tensor.storage_offset() + offset)


class Recorder(TorchDispatchMode):
    """Takes notes of PyTorch's operators while it is entered; launches of kernels are added by whoever launches."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors: list[Tensor] = []  # by place; kept alive, so that an address is only ever one's
        self._places: dict[int, int] = {}  # by storage
        self._buffers: dict[int, Tensor] = {}  # by place
        self._used: set[int] = set()  # places
        self._steps: list[Step] = []
        self._understood = True
        self._given = len(tensors)
        storages = sorted((each.untyped_storage() for each in tensors), key=lambda each: each.data_ptr())
        for before, after in itertools.pairwise(storages):
            if before._cdata == after._cdata or after.data_ptr() < before.data_ptr() + before.nbytes():
                self.give_up()  # of two in one memory it cannot be told which an address belongs to
        for each in tensors:
            self._own(each)

    def __enter__(self) -> Recorder:
        super().__enter__()  # type: ignore[no-untyped-call]
        _local.recorder = self
        return self

    def __exit__(self, *exception: Any) -> None:
        _local.recorder = None
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        results = [result] if isinstance(result, Tensor) else result if isinstance(result, (tuple, list)) else []
        new = [each for each in results if each.untyped_storage()._cdata not in self._places]
        if func._schema.name in _BUFFERS or (func._schema.name == "aten::new_zeros" and result.numel() == 0):
            self._buffers[self._own(result)] = result
        elif new or func._schema.is_mutable:
            noted = [self._noted(each) for each in args], {name: self._noted(each) for name, each in kwargs.items()}
            if new and not isinstance(result, Tensor):
                self.give_up()
            else:
                self._steps.append(_operator(func, *noted, self._own(result) if new else None))
        elif not results and not (args and isinstance(args[0], Tensor) and args[0].device.type == "cpu"):
            self.give_up()  # a value was read
        return result

    def give_up(self) -> None:
        """Something is not understood: there will be no program."""
        self._understood = False

    def add(self, step: Step) -> None:
        self._steps.append(step)

    def view(self, tensor: Tensor) -> View:
        place = self._places.get(tensor.untyped_storage()._cdata)
        if place is None or tensor.dtype != self._tensors[place].dtype:
            self.give_up()
            return View(0, None)
        self._used.add(place)
        whole = self._tensors[place]
        offset = tensor.storage_offset() - whole.storage_offset()
        if (offset, tensor.shape, tensor.stride()) == (0, whole.shape, whole.stride()):
            return View(place, None)
        return View(place, (tensor.shape, tensor.stride(), offset))

    def address(self, address: int | None) -> tuple[int, int] | None:
        """The place of the tensor that an address lies in, and the bytes from its start; None for the null pointer."""
        if not address:
            return None
        for place, each in enumerate(self._tensors):
            storage = each.untyped_storage()
            if 0 <= address - storage.data_ptr() < storage.nbytes():
                return place, address - each.data_ptr()
        self.give_up()
        return None

    def program(self, results: tuple[Tensor, ...]) -> Program | None:
        """What was noted; None if it cannot be repeated."""
        views = [self.view(each) for each in results]
        if not self._understood:
            return None
        places = len(self._tensors)
        return Program(self._steps, places, places - self._given - len(self._buffers), self._buffers, self._used, views)

    def _own(self, tensor: Tensor) -> int:
        place = len(self._tensors)
        self._places[tensor.untyped_storage()._cdata] = place
        self._tensors.append(tensor)
        return place

    def _noted(self, argument: Any) -> Any:
        if isinstance(argument, (tuple, list)) and any(isinstance(each, Tensor) for each in argument):
            self.give_up()
        return self.view(argument) if isinstance(argument, Tensor) else argument


def recorder() -> Recorder | None:
    """The one that this thread's launches are to be added to, if any."""
    return getattr(_local, "recorder", None)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    if device.type == "cpu" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


def current_stream(device: torch.device) -> int:
    """Its handle; 0, as the default stream's, where there is none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _operator(func: Any, args: list[Any], kwargs: dict[str, Any], made: int | None) -> Step:
    """One of PyTorch's, and the place of its result if that has memory of its own."""

    def step(tensors: list[Any], addresses: list[int], stream: int) -> None:
        result = func(
            *[each(tensors) if isinstance(each, View) else each for each in args],
            **{name: each(tensors) if isinstance(each, View) else each for name, each in kwargs.items()},
        )
        if made is not None:
            tensors[made], addresses[made] = result, result.data_ptr()

    return step
