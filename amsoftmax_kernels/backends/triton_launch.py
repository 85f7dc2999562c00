"""Launches of Triton's kernels, and the same launches as steps of a program that is repeated (:mod:`.replay`).

To choose a compiled kernel by the arguments takes Triton some 30 µs, to have that one launched again 8: its launcher
describes tensors to the bulk copy engine anew, and asks for memory and for profilers' hooks that are not there. So what the
launcher hands to its C part is taken down once; a step calls that part itself, with the addresses of the day.
"""

from __future__ import annotations

import copy
import functools
import re
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from . import replay

try:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # the backend says so
    pass

# Of Triton: those whose launchers have been read, and do nothing after their C part.
_FIRST_READ, _NOT_READ = (3, 6), (3, 9)
launch_directly = True  # for who has to do without
_MAX_DESCRIBED = 64  # addresses of a tensor whose description is kept: an allocator gives the same ones again and again


@functools.cache  # as a step asks each time
def version(text: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(each) for each in re.findall(r"\d+", text)[:2])


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    compiled = kernel[grid](*args, **kwargs)
    recorder = replay.recorder()
    if recorder is None:
        return
    if compiled is None:  # interpreted
        recorder.give_up()
        return
    named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    recorder.add(_relaunch(recorder, compiled, grid, [named[name] for name in kernel.arg_names]))


class _Address:
    """A tensor without its memory, which a program must not keep: all that Triton's launcher asks of one."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class _Operand(NamedTuple):
    """An argument that is a tensor, or a TensorDescriptor of one."""

    argument: int
    place: int  # in the program
    offset: int  # bytes
    fields: dict[str, Any] | None  # of the TensorDescriptor, beside its base

    def at(self, address: int) -> Any:
        base = _Address(address)
        if self.fields is None:
            return base
        # What it holds beside is Triton's own affair, and differs between versions.
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__.update(self.fields, base=base)
        return descriptor


def _relaunch(recorder: replay.Recorder, compiled: Any, grid: tuple[int, ...], args: list[Any]) -> replay.Step:
    """The launch again, of the kernel that Triton chose by these arguments."""
    grid = (*grid, 1, 1)[:3]
    operands: list[_Operand] = []
    for i, each in enumerate(args):
        if isinstance(each, Tensor):
            tensor, fields = each, None
        elif isinstance(each, TensorDescriptor):
            tensor, fields = each.base, {name: value for name, value in vars(each).items() if name != "base"}
        else:
            continue
        place = recorder.address(tensor.data_ptr())
        args[i] = 0
        if place is not None:
            operands.append(_Operand(i, *place, fields))
            args[i] = operands[-1].at(tensor.data_ptr())
    launcher = compiled[grid]  # loads the kernel

    def by_launcher(tensors: list[Any], addresses: list[int], stream: int) -> None:
        values = args.copy()
        for each in operands:
            address = addresses[each.place] + each.offset
            values[each.argument] = address if each.fields is None else each.at(address)
        launcher(*values, stream=stream)

    return _Direct.of(compiled, grid, args, operands, by_launcher) or by_launcher


class _Taken(NamedTuple):
    """What Triton's launcher hands to its C part."""

    before: list[Any]
    values: list[Any]  # the kernel's arguments, after those before in the versions that do not keep them apart
    kind: type | None  # of what holds the values, in those that do

    @classmethod
    def of(cls, compiled: Any, grid: tuple[int, ...], stream: Any, args: list[Any]) -> _Taken:
        taken: list[Any] = []
        launcher = copy.copy(compiled.run)
        launcher.launch = _around(launcher.launch, lambda *given: taken.extend(given))
        launcher(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)
        if isinstance(taken[-1], (tuple, list)):  # since Triton 3.7
            return cls(taken[:-1], list(taken[-1]), type(taken[-1]))
        return cls([], taken, None)


def _c_part(launch: Any) -> Any:
    """Of a launcher's function: itself, or what a function that describes tensors first calls then."""
    names = launch.__code__.co_freevars if isinstance(launch, types.FunctionType) else ()
    return launch.__closure__[names.index("launcher")].cell_contents if "launcher" in names else launch


def _around(launch: Any, part: Callable[..., None]) -> Any:
    """A launcher's function, with another C part."""
    names = launch.__code__.co_freevars if isinstance(launch, types.FunctionType) else ()
    if "launcher" not in names:
        return part
    cells = list(launch.__closure__)
    cells[names.index("launcher")] = types.CellType(part)
    return types.FunctionType(launch.__code__, launch.__globals__, closure=tuple(cells))


class _Direct:
    """A step that calls the C part of Triton's launcher."""

    def __init__(
        self,
        compiled: Any,
        grid: tuple[int, ...],
        args: list[Any],
        taken: _Taken,
        stream: int,
        pointers: list[tuple[int, _Operand]],
        described: list[tuple[int, _Operand]],
        by_launcher: replay.Step,
    ) -> None:
        """``stream``: its position before the values, or among them; an operand's is among them."""
        self._compiled, self._grid, self._args = compiled, grid, args
        self._launch = _c_part(compiled.run.launch)
        self._before, self._values, self._kind = taken
        self._stream = stream
        self._pointers = [(i, each.place, each.offset) for i, each in pointers]
        self._described: list[tuple[int, _Operand, dict[int, Any]]] = [(i, each, {}) for i, each in described]
        self._by_launcher = by_launcher

    @classmethod
    def of(
        cls, compiled: Any, grid: tuple[int, ...], args: list[Any], operands: list[_Operand], by_launcher: replay.Step
    ) -> _Direct | None:
        """None where this Triton's launcher is not understood."""
        if not (launch_directly and _FIRST_READ <= version(triton.__version__) < _NOT_READ):
            return None
        stream = _Address(0)
        try:
            run = compiled.run
            if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
                return None
            taken, again = (_Taken.of(compiled, grid, stream, args) for _ in range(2))
        except Exception:  # whatever has changed there
            return None
        # Descriptions are made anew each time; everything else is handed on.
        pairs = enumerate(zip(taken.values, again.values, strict=True))
        made = [i for i, (one, other) in pairs if one is not other and one != other]  # a NaN is itself
        pointers: list[tuple[int, _Operand]] = []
        descriptors: list[_Operand] = []
        for each in operands:
            base = args[each.argument] if each.fields is None else args[each.argument].base
            found = [i for i, value in enumerate(taken.values) if value is base]
            if len(found) == 1:
                pointers.append((found[0], each))
            else:
                descriptors.append(each)
        streams = [i for i, value in enumerate(taken.before or taken.values) if value is stream]
        if len(streams) != 1 or len(made) != len(descriptors) or any(each.fields is None for each in descriptors):
            return None
        described = list(zip(made, descriptors, strict=True))
        return cls(compiled, grid, args, taken, streams[0], pointers, described, by_launcher)

    def __call__(self, tensors: list[Any], addresses: list[int], stream: int) -> None:
        if _hooked():
            self._by_launcher(tensors, addresses, stream)
            return
        values = self._values.copy()
        for i, place, offset in self._pointers:
            values[i] = addresses[place] + offset
        for i, operand, known in self._described:
            description = known.get(addresses[operand.place] + operand.offset)
            values[i] = self._describe(addresses, i) if description is None else description
        if self._kind is None:
            values[self._stream] = stream
            self._launch(*values)
        else:
            before = self._before.copy()
            before[self._stream] = stream
            self._launch(*before, self._kind(values))

    def _describe(self, addresses: list[int], wanted: int) -> Any:
        """The description that is the value wanted, of a tensor at its address."""
        args = self._args.copy()
        for _, each, _ in self._described:
            args[each.argument] = each.at(addresses[each.place] + each.offset)
        made = _Taken.of(self._compiled, self._grid, 0, args).values
        for i, each, known in self._described:
            if len(known) >= _MAX_DESCRIBED:
                known.clear()
            known[addresses[each.place] + each.offset] = made[i]
        return made[wanted]


def _hooked() -> bool:
    """Whether a profiler wants to be told of launches."""
    runtime = triton.knobs.runtime
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    return any(each is not None and (type(each) is not triton.knobs.HookChain or each.calls) for each in hooks)
