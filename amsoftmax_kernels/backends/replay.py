"""What a function asks of a device, noted once and repeated with other addresses: for problems that the host is slower at.

On ten thousand classes a step's kernels take some 60 µs; to decide on their arguments takes longer. That depends on nothing
but the layout of the tensors and on plain values. Together they are the key under which the sequence of buffers, of launches
and of PyTorch's operators is remembered: like a CUDA graph, but the addresses may change.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..arguments import no_autocast

MAX_PROGRAMS = 256  # remembered for a function; each takes some 30 kB, 80 where addresses never recur
ALIGNMENT = 16  # bytes: kernels are compiled for addresses that are multiples of it, or not
_SPACING = 512  # bytes between buffers of one allocation, as CUDA's allocator has it
_BUFFERS = frozenset({"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"})
_local = threading.local()
# PyTorch keeps by process whether any mode is entered: threads that enter and leave across one another would leave it so.
_noting = threading.Lock()

# A step of a program, given all its tensors and their addresses, of which it may fill in some, and the stream.
Step = Callable[[list[Any], list[int], int], None]


class Layout:
    """Where contiguous tensors lie in one memory, by their shapes and dtypes alone.

    Not by how it was made: ``torch.utils.checkpoint`` has one call's memory read by another's layout.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.offsets: list[int] = []  # in bytes
        self.bytes = 0
        for each in tensors:
            self.offsets.append(self.bytes)
            self.bytes += _spaced(each.numel() * each.element_size())
        self._parts = tuple((each.shape, each.dtype) for each in tensors)
        self._hash = hash(self._parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Layout) and self._parts == other._parts)

    def unpacked(self, memory: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            memory[start : start + dtype.itemsize * shape.numel()].view(dtype).view(shape)
            for start, (shape, dtype) in zip(self.offsets, self._parts, strict=True)
        )


class Packed(NamedTuple):
    """Tensors in one memory, which are returned and given at the cost of one."""

    memory: Tensor  # [bytes] uint8
    layout: Layout

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...]) -> Packed:
        """Copies of tensors."""
        pieces: list[Tensor] = []
        for each in tensors:
            size = each.numel() * each.element_size()
            pieces += each.contiguous().view(-1).view(torch.uint8), each.new_empty(_spaced(size) - size, dtype=torch.uint8)
        return cls(torch.cat(pieces), Layout(tensors))

    def unpacked(self) -> tuple[Tensor, ...]:
        return self.layout.unpacked(self.memory)


class Replayed:
    """``function`` of tensors and plain values, with the same results: repeated from the third call with a key on.

    The first call is left alone: a batch of a size of its own would be noted for nothing.

    Args:
        function: positional arguments, the first a tensor on the device; returns a tuple of tensors. It may read no tensor's
            value, nor anything else that changes, beside what ``consider`` returns.
        consider: of the same arguments; what joins the key (their devices are not in it), None to leave the call alone.
        packed: results from this one on, each a whole buffer that ``function`` made, are returned as one :class:`Packed`, if
            the call is not left alone by ``consider``; copied where it is not repeated, as what is saved for a backward
            pass must not depend on that. A function that is given a :class:`Packed` is one of the tensors in it.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        consider: Callable[..., Hashable | None],
        packed: int | None = None,
    ) -> None:
        self.function, self._consider, self._packed = function, consider, packed
        self._programs: dict[Hashable, Program | None] = {}  # None where it cannot be repeated
        self._seen: set[Hashable] = set()

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        considered = self._consider(*arguments)
        if considered is None:
            return self._run(arguments)
        parts: list[Any] = [considered]
        tensors: list[Tensor] = []
        addresses: list[int] = []
        packed: set[int] = set()
        for each in arguments:
            if isinstance(each, Tensor):
                address = each.data_ptr()
                parts += each.shape, each.stride(), each.dtype, address % ALIGNMENT
                tensors.append(each)
                addresses.append(address)
            elif isinstance(each, Packed):
                packed.add(len(tensors))
                parts += each.layout, each.memory.data_ptr() % ALIGNMENT
                tensors.append(each.memory)
                addresses.append(each.memory.data_ptr())
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
                with Recorder(tensors, packed) as recorder:
                    result = self._run(arguments)
                self._programs[key] = recorder.program(result, self._packed)
            finally:
                _noting.release()
            return self._packing(result)
        return self._packing(self._run(arguments))

    def _run(self, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        plain: list[Any] = []
        for each in arguments:
            if isinstance(each, Packed):
                plain += each.unpacked()
            else:
                plain.append(each)
        return self.function(*plain)

    def _packing(self, results: tuple[Tensor, ...]) -> tuple[Any, ...]:
        count = self._packed
        return results if count is None else (*results[:count], Packed.of(results[count:]))

    def forget(self) -> None:
        self._seen.clear()
        self._programs.clear()


class Program:
    """Steps on given tensors, buffers and what the steps themselves make, each in its place; and what is returned."""

    def __init__(
        self,
        steps: list[Step],
        given: int,
        places: int,
        made: int,
        buffers: dict[int, Tensor],
        used: set[int],
        results: list[View],
        packed: list[tuple[int, Tensor]] | None,
    ) -> None:
        """Of the places ``given`` are a caller's, ``made`` are by steps. ``buffers`` are like those to make; unless
        ``used``, it is addresses that matter.

        ``packed``: more results, buffers of these places, which are returned in one memory.
        """
        self._steps, self._results = steps, results
        self._may_cast = made > 0  # autocast is only for operators without an out=
        self._tensors: list[tuple[int, torch.Size, tuple[int, ...], torch.dtype, torch.device]] = []
        constants: list[Tensor | None] = [None] * places
        self._scratch, self._kept = _Memory(), _Memory()
        self._layout = None if packed is None else Layout([each for _, each in packed])
        if packed is not None and self._layout is not None:
            for (place, each), offset in zip(packed, self._layout.offsets, strict=True):
                if each.numel():
                    self._kept.add(place, buffers[place], place in used, offset)
        for place, like in buffers.items():
            if place in self._kept:
                continue
            if like.numel() == 0:  # nothing is ever written to it
                with torch.inference_mode(False):  # or a backward pass could not have it
                    constants[place] = torch.empty_like(like)
            elif place in used:
                self._tensors.append((place, like.shape, like.stride(), like.dtype, like.device))
            else:
                self._scratch.add(place, like, False, self._scratch.bytes)
        self._constants, self._no_addresses = constants[given:], [0] * (places - given)

    def __call__(self, tensors: list[Any], addresses: list[int]) -> tuple[Any, ...]:
        device = tensors[0].device
        tensors += self._constants
        addresses += self._no_addresses
        for place, size, stride, dtype, where in self._tensors:
            tensor = torch.empty_strided(size, stride, dtype=dtype, device=where)
            tensors[place], addresses[place] = tensor, tensor.data_ptr()
        scratch = self._scratch.make(device, tensors, addresses)
        kept = self._kept.make(device, tensors, addresses)
        if self._may_cast or not _is_current(device):
            with no_autocast(device), on_device(device):
                self._repeat(tensors, addresses)
        else:  # nothing to enter, which would take some µs
            self._repeat(tensors, addresses)
        del scratch  # until here its addresses are in use
        results = [tensors[each.place] if each.layout is None else each(tensors) for each in self._results]
        if self._layout is not None:
            results.append(Packed(torch.empty(0, dtype=torch.uint8, device=device) if kept is None else kept, self._layout))
        return tuple(results)

    def _repeat(self, tensors: list[Any], addresses: list[int]) -> None:
        stream = current_stream(tensors[0].device)
        for step in self._steps:
            step(tensors, addresses, stream)


class _Memory:
    """Buffers in one allocation."""

    def __init__(self) -> None:
        self.bytes = 0
        self._offsets: dict[int, int] = {}  # by place
        self._used: list[tuple[int, torch.dtype, torch.Size, tuple[int, ...], int]] = []  # as tensors

    def __contains__(self, place: int) -> bool:
        return place in self._offsets

    def add(self, place: int, like: Tensor, used: bool, offset: int) -> None:
        self._offsets[place] = offset
        if used:
            self._used.append((place, like.dtype, like.shape, like.stride(), offset // like.dtype.itemsize))
        self.bytes = offset + _spaced(like.untyped_storage().nbytes())

    def make(self, device: torch.device, tensors: list[Any], addresses: list[int]) -> Tensor | None:
        if not self._offsets:
            return None
        memory = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        first = memory.data_ptr()
        for place, offset in self._offsets.items():
            addresses[place] = first + offset
        for place, dtype, size, stride, offset in self._used:
            tensors[place] = memory.view(dtype).as_strided(size, stride, offset)
        return memory


def _same(one: Tensor, other: Tensor) -> bool:
    """Of two tensors in one memory, whether they are contiguous and the same but for the shape."""
    of_both = ((each.dtype, each.numel(), each.storage_offset(), each.is_contiguous()) for each in (one, other))
    return len(set(of_both)) == 1 and one.is_contiguous()


def _spaced(size: int) -> int:
    return -(-size // _SPACING) * _SPACING


class View:
    """A tensor among a program's: the one in a place, or a part of it."""

    def __init__(self, place: int, layout: tuple[torch.dtype, Any, Any, Any] | None) -> None:
        self.place, self.layout = place, layout

    def __call__(self, tensors: list[Any]) -> Tensor:
        tensor: Tensor = tensors[self.place]
        if self.layout is None:
            return tensor
        dtype, size, stride, offset = self.layout
        if tensor.dtype != dtype:
            tensor = tensor.view(dtype)
        return tensor.as_strided(size, stride, tensor.storage_offset() + offset)


class Recorder(TorchDispatchMode):
    """Takes notes of PyTorch's operators while it is entered; launches of kernels are added by whoever launches."""

    def __init__(self, tensors: list[Tensor], packed: Collection[int] = ()) -> None:
        """``packed``: which of the tensors are memories that others are packed in."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._packed = packed
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
        if place is None:
            self.give_up()
            return View(0, None)
        whole = self._tensors[place]
        if tensor.dtype != whole.dtype and place not in self._packed:
            self.give_up()
        self._used.add(place)
        start = whole.storage_offset() * whole.dtype.itemsize
        offset = tensor.storage_offset() - start // tensor.dtype.itemsize
        if (offset, tensor.shape, tensor.stride(), tensor.dtype) == (0, whole.shape, whole.stride(), whole.dtype):
            return View(place, None)
        return View(place, (tensor.dtype, tensor.shape, tensor.stride(), offset))

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

    def program(self, results: tuple[Tensor, ...], packed: int | None = None) -> Program | None:
        """What was noted, with the results from ``packed`` on in one memory; None if it cannot be repeated."""
        count = len(results) if packed is None else packed
        views = [self.view(each) for each in results[:count]]
        together = [(self._places.get(each.untyped_storage()._cdata, -1), each) for each in results[count:]]
        taken = {view.place for view in views}
        for place, each in together:
            whole = self._buffers.get(place)
            if each.numel() and (whole is None or place in taken or not _same(each, whole)):
                self.give_up()  # of these buffers alone it is known that no one else has them
            taken.add(place)
        if not self._understood:
            return None
        places = len(self._tensors)
        made = places - self._given - len(self._buffers)
        more = None if packed is None else together
        return Program(self._steps, self._given, places, made, self._buffers, self._used, views, more)

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
    return nullcontext() if _is_current(device) else torch.cuda.device(device)


def _is_current(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.current_device() == device.index


def current_stream(device: torch.device) -> int:
    """Its handle; 0, as the default stream's, where there is none."""
    # PyTorch's public function makes an object of it, in some 2 µs; Triton asks so too.
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


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
