"""Run as a program, without the interpreter: the Triton backend's launches when they are repeated, against the first ones.

What reaches the launcher must be the same but for the addresses of buffers, which must change one for one.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from amsoftmax_kernels import am_softmax_loss
from amsoftmax_kernels.backends import triton, triton_launch
from bench import no_driver

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"save_bytes": 0},
    {"scale": 100.0, "return_predictions": True},
    {"normalize_features": False, "interclass_filter": 0.5},
    {"reduction": "none"},
)


def main() -> None:
    from bench import host
    from bench.estimate import CARDS

    launches: list[tuple[Any, ...]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(host._without_products())
        stack.enter_context(host._of_triton(CARDS["sm_90"], lambda *launch: launches.append(launch)))
        tensors = host.problem(48, 128, 1000, torch.device("cpu"))
        for options in OPTIONS:
            print(f"{options}: {_run(launches, options, *tensors)} launches the same")
        assert "_Direct" in _steps() and "by_launcher" not in _steps()
        with mock.patch.object(triton_launch, "_MAX_DESCRIBED", 1):
            print(f"described again: {_run(launches, {}, *tensors)} launches the same")

        # A profiler that comes later is told of each launch; where it goes again, no one is.
        runtime, hook = triton_launch.triton.knobs.runtime, Profiler()
        chain = runtime.launch_enter_hook
        chain.add(hook)
        assert chain in _hooks(launches, *tensors)
        chain.remove(hook)
        assert not _hooks(launches, *tensors)
        runtime.launch_enter_hook = hook
        assert hook in _hooks(launches, *tensors)
        runtime.launch_enter_hook = chain

        # A launcher that is not understood, or has not been read, is called itself.
        for unknown in (
            mock.patch.object(triton_launch._Taken, "of", side_effect=AttributeError),
            mock.patch.object(triton_launch, "_NOT_READ", (3, 6)),
            mock.patch.object(triton_launch, "launch_directly", False),
        ):
            with unknown:
                print(f"by the launcher: {_run(launches, {}, *tensors)} launches the same")
            assert "_Direct" not in _steps() and "by_launcher" in _steps()


class Profiler:
    """A hook that is not Triton's chain of them."""

    calls = 0

    def __call__(self, *unused: Any) -> None: ...


def _hooks(launches: list[tuple[Any, ...]], *tensors: Tensor) -> list[Any]:
    """What each launch of a repeated step is to call before it."""
    launches.clear()
    _step(launches, {}, *tensors)
    assert len(launches) > 1
    known = (Profiler, triton_launch.triton.knobs.HookChain)
    found = [[each for each in launch if isinstance(each, known)] for launch in launches]
    assert all(each == found[0] for each in found)
    return found[0]


def _steps() -> set[str]:
    """What steps all programs have."""
    programs = (each for replayed in triton.fused._replayed.values() for each in replayed._programs.values())
    steps = (step for program in programs if program is not None for step in program._steps)
    return {getattr(step, "__name__", type(step).__name__) for step in steps}


def _run(launches: list[tuple[Any, ...]], options: dict[str, Any], *tensors: Tensor) -> int:
    """The launches of a step, the first ones checked against those that follow."""
    runs = []
    triton.fused.forget()
    for _ in range(5):
        launches.clear()
        with Hoard() as hoard:
            forward = _step(launches, options, *tensors)
        plain = [_plain(launch) for launch in launches]
        runs.append([plain[:forward], plain[forward:]])
        made = hoard.forget()
        launches.clear()
        gc.collect()
        assert not any(each() is not None for each in made), "a program keeps memory"
    given = {each.data_ptr() for each in tensors}
    for later in runs[1:]:
        for first, again in zip(runs[0], later, strict=True):  # what is saved between the two has been moved there
            _check(first, again, given)
    for later in runs[3:]:
        _check(*([*forward, *backward] for forward, backward in (runs[2], later)), given)
    return sum(map(len, runs[0]))


class Hoard(TorchDispatchMode):
    """Keeps what is made, so that no address is used twice, until it is told to forget."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made.append(result)
        return result

    def forget(self) -> list[weakref.ref[Any]]:
        """References to the tensors made, views among them, which should be gone, but for those of no memory."""
        references = [weakref.ref(each) for each in self.made if isinstance(each, Tensor) and each.numel()]
        self.made.clear()
        return references


def _step(launches: list[Any], options: dict[str, Any], features: Tensor, weight: Tensor, labels: Tensor) -> int:
    """How many of the launches are the forward pass's."""
    with torch.autocast("cpu", torch.bfloat16):
        out = am_softmax_loss(features, weight, labels, backend="triton", **options)
    forward = len(launches)
    loss = out[0] if isinstance(out, tuple) else out
    torch.autograd.grad(loss, (features, weight), torch.ones_like(loss))
    return forward


def _plain(launch: tuple[Any, ...]) -> list[Any]:
    """Tensors as the launcher reads them; a bulk copy's description one after the other."""
    plain: list[Any] = []
    for each in launch:
        if isinstance(each, Tensor):
            plain.append(("address", each.data_ptr()))
        elif isinstance(each, int) and each > 1 << 24:  # no size here is as large
            plain.append(("address", each))
        elif type(each).__name__ in ("LazyDict", "HookChain"):  # for profilers, of which there is none
            plain.append(None)
        elif isinstance(each, no_driver.BulkCopy):
            plain += [("address", each.address), *each.rest]
        else:
            plain.append(each)
    return plain


def _check(first: list[list[Any]], later: list[list[Any]], given: set[int]) -> None:
    assert len(first) == len(later) > 1
    there: dict[int, int] = {}
    back: dict[int, int] = {}
    for launch, again in zip(first, later, strict=True):
        assert len(launch) == len(again), (launch, again)
        for one, other in zip(launch, again, strict=True):
            if not (isinstance(one, tuple) and one[0] == "address"):
                assert type(one) is type(other) or {type(one), type(other)} <= {list, tuple, torch.Size}, (one, other)
                assert list(one) == list(other) if isinstance(one, (list, tuple)) else one == other, (one, other)
                continue
            address = other[1] if isinstance(other, tuple) else other
            assert isinstance(address, int)
            if one[1] in given:
                assert address == one[1], (launch, again)
            assert there.setdefault(one[1], address) == address
            assert back.setdefault(address, one[1]) == one[1]


if __name__ == "__main__":
    main()
