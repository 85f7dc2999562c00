"""What is repeated is what would have been done: bit for bit, whatever the addresses, and nothing that is not understood."""

from __future__ import annotations

import gc
import itertools
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends import cuda, fused, replay

from . import replayed_triton
from .cases import Case
from .test_cuda import BY_NAME, ours


@pytest.fixture
def replayed(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "replayed_on", lambda device: True)
    cuda.fused.forget()


def programs(name: str) -> list[replay.Program | None]:
    return list(cuda.fused._replayed[name]._programs.values())


def without(monkeypatch: pytest.MonkeyPatch, function: Callable[[], Any]) -> Any:
    """Its result where nothing is replayed."""
    with monkeypatch.context() as patch:
        patch.setattr(fused, "replayed_on", lambda device: False)
        return function()


def check_repeated(
    monkeypatch: pytest.MonkeyPatch, step: Callable[..., tuple[Tensor, ...]], case: Case, dtype: torch.dtype = torch.float32
) -> None:
    """Steps on new values at new addresses: two until it is noted, and two repeated."""
    alive = []
    for seed in range(4):
        tensors = case.tensors(dtype, seed)
        actual = step(*tensors)
        expected = without(monkeypatch, lambda tensors=tensors: step(*tensors))
        assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(actual, expected, strict=True)), seed
        alive.append((tensors, actual))


@pytest.mark.parametrize("save_bytes", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in ("plain", "no-fn", "s1000")] + [("plain", torch.float16), ("plain", torch.float32)],
)
def test_a_step_is_repeated(
    name: str, reduction: str, save_bytes: int | None, dtype: torch.dtype, replayed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = BY_NAME[name]
    options = {**case.options, "reduction": reduction, "save_bytes": save_bytes}
    check_repeated(monkeypatch, lambda *tensors: ours(dtype, *tensors, **options), case)
    assert list(map(bool, programs("forward_loss") + programs("backward_loss"))) == [True] * 2


def test_the_function_is_left_alone_from_the_third_call_on(replayed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name, each in cuda.fused._replayed.items():
        right = each.function
        monkeypatch.setattr(each, "function", lambda *a, right=right, name=name: (calls.append(name), right(*a))[1])
    for seed, expected in enumerate((2, 2, 0, 0)):
        calls.clear()
        ours(torch.bfloat16, *BY_NAME["plain"].tensors(torch.float32, seed), reduction="mean")
        assert len(calls) == expected, calls


@pytest.mark.parametrize(
    "what",
    ["predictions", "margin a class", "margin a class, recomputed", "margin object", "scale", "bf16 centres", "no gradient"],
)
def test_other_steps_are_repeated(what: str, replayed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["plain"]

    def step(features: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        weight = weight.to(torch.bfloat16) if what == "bf16 centres" else weight
        leaves = [each.detach().requires_grad_(what != "no gradient") for each in (features, weight)]
        options: dict[str, Any] = {"return_predictions": what == "predictions"}
        if what == "scale":
            options["scale"] = torch.tensor(20.0, requires_grad=True)
            leaves.append(options["scale"])
        if "margin a class" in what:
            options |= {"margin": torch.linspace(0, 1, case.C), "save_bytes": 0 if "recomputed" in what else None}
        if what == "margin object":
            options["margin"] = lambda cosine, labels, norm: cosine.clamp(-0.9, 0.9) - 0.2
        with torch.autocast("cpu", torch.bfloat16):
            out = ak.am_softmax_loss(*leaves[:2], labels, backend="cuda", **options)
        loss, *more = out if isinstance(out, tuple) else (out,)
        if what == "no gradient":
            return (loss,)
        return loss.detach(), *more, *torch.autograd.grad(loss, leaves, upstream[0].float())

    check_repeated(monkeypatch, step, case)
    assert any(programs("loss" if what == "no gradient" else "forward_loss") + programs("forward"))
    assert what == "no gradient" or any(programs("backward_loss") + programs("backward"))


def one_step(wrapped: Callable[..., Tensor], tensors: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    """The loss and gradients, ``wrapped`` being given what makes the loss."""
    features, weight, labels, upstream = (each.contiguous() for each in tensors)
    leaves = [each.detach().requires_grad_() for each in (features, weight)]

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ak.am_softmax_loss(*leaves, labels, backend="cuda", **options)

    value = wrapped(loss)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream[0].float())


@pytest.mark.parametrize("save_bytes", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_checkpoints(before: int, save_bytes: int | None, replayed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass has the layout of a first call and the memory of a second, either of which may be repeated."""

    def checkpointed(loss: Callable[[], Tensor]) -> Tensor:
        result: Tensor = checkpoint(lambda: 3 * loss() - loss(), use_reentrant=False)
        return result

    tensors = BY_NAME["plain"].tensors(torch.float32)
    for _ in range(before):
        one_step(lambda loss: loss(), tensors, save_bytes=save_bytes)
    exact = without(monkeypatch, lambda: one_step(checkpointed, tensors, save_bytes=save_bytes))
    for _ in range(2):
        actual = one_step(checkpointed, tensors, save_bytes=save_bytes)
        assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(actual, exact, strict=True))
    assert all(programs("forward_loss") + programs("backward_loss"))


def test_forgotten_between_the_passes(replayed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(loss: Callable[[], Tensor]) -> Tensor:
        value = loss()
        cuda.fused.forget()
        return value

    tensors = BY_NAME["plain"].tensors(torch.float32)
    exact = without(monkeypatch, lambda: one_step(lambda loss: loss(), tensors))
    for wrapped in (lambda loss: loss(), lambda loss: loss(), lambda loss: loss(), forgetful, forgetful):
        assert all(map(torch.equal, one_step(wrapped, tensors), exact))


@pytest.mark.parametrize("offset", [0, 512, 8, 1])
def test_hooks_that_move_what_is_saved(offset: int, replayed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into part of something larger; and a step without them thereafter."""

    def moved(tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.uint8:
            return tensor
        larger = torch.full((tensor.numel() + 1024,), 255, dtype=torch.uint8)
        return larger[offset : offset + tensor.numel()].copy_(tensor)

    def hooked(loss: Callable[[], Tensor]) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, moved):
            return loss()

    tensors = BY_NAME["plain"].tensors(torch.float32)
    exact = without(monkeypatch, lambda: one_step(lambda loss: loss(), tensors))
    for wrapped in (hooked, hooked, hooked, lambda loss: loss(), hooked, lambda loss: loss()):
        assert all(map(torch.equal, one_step(wrapped, tensors), exact))
    assert all(programs("forward_loss") + programs("backward_loss"))


def test_values_that_change(replayed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a program of its own: none is run with another's numbers."""
    case = BY_NAME["plain"]
    tensors = case.tensors(torch.float32)
    names = ("scale", "margin", "interclass_filter", "reduction")
    varied = [
        dict(zip(names, each, strict=True))
        for each in itertools.product((30.0, 20.0), (0.35, 0.1), (None, 0.2), ("mean", "sum"))
    ]
    expected = without(monkeypatch, lambda: [ours(torch.bfloat16, *tensors, **options) for options in varied])
    found = []
    for _ in range(3):
        for options, exact in zip(varied, expected, strict=True):
            actual = ours(torch.bfloat16, *tensors, **options)
            assert all(map(torch.equal, actual, exact)), options
            found.append(actual[0].item())
    assert len(set(found)) == 16 and len(programs("forward_loss")) == 16


def test_addresses_layouts_and_sizes_that_change(replayed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["plain"]
    features, weight, labels, upstream = case.tensors(torch.float32)
    memory = torch.empty(features.numel() + 8)
    for _ in range(4):
        for variant in ("guarded", "contiguous", "odd address", "columns", "fewer rows", "int32"):
            x, rows = features, slice(None)
            if variant == "contiguous":
                x = features.contiguous()
            elif variant == "odd address":
                x = memory[1 : 1 + features.numel()].view(features.shape).copy_(features)
            elif variant == "columns":
                x = features.T.contiguous().T
            elif variant == "fewer rows":
                rows = slice(7)
            y = labels.int() if variant == "int32" else labels
            given = (x[rows], weight, y[rows], upstream[rows])
            actual = ours(torch.bfloat16, *given, reduction="mean")
            expected = without(monkeypatch, lambda given=given: ours(torch.bfloat16, *given, reduction="mean"))
            assert all(map(torch.equal, actual, expected)), variant


def test_noted_in_inference_mode(replayed: None) -> None:
    """What no gradient was wanted of, and then one is."""
    function = alone(lambda a: (a.new_empty(0, 3), a * 2))
    for mode in (True, True, True, False):
        with torch.inference_mode(mode):
            empty, twice = function(torch.ones(2))
    leaf = torch.ones(2, requires_grad=True)
    (leaf * twice).sum().backward()
    (torch.zeros(0, 3, requires_grad=True) * empty).sum().backward()
    tensors = BY_NAME["plain"].tensors(torch.float32)
    for _ in range(3):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            loss = ak.am_softmax_loss(*tensors[:3], backend="cuda")
    for _ in range(3):
        assert torch.equal(ours(torch.bfloat16, *tensors, reduction="mean")[0], loss)


def test_large_problems_are_left_alone(replayed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["plain"]
    monkeypatch.setattr(fused, "REPLAYED_LOGITS", case.B * case.C - 1)
    for _ in range(3):
        ours(torch.bfloat16, *case.tensors(torch.float32))
    assert not cuda.fused._replayed["forward_loss"]._seen


def test_several_chunks_are_left_alone(replayed: None, short_chunks: None) -> None:
    """Repeated, the buffers of all would be there at once."""
    for _ in range(4):
        ours(torch.bfloat16, *BY_NAME["plain"].tensors(torch.float32), reduction="mean")
    assert programs("forward_loss") == programs("backward_loss") == []
    for _ in range(4):
        ours(torch.bfloat16, *BY_NAME["one-chunk"].tensors(torch.float32), reduction="mean")
    assert all(programs("forward_loss") + programs("backward_loss"))


@pytest.mark.parametrize("margin", [0.2, lambda cosine, labels, norm: cosine - 0.2], ids=["number", "object"])
def test_an_empty_batch_has_losses_of_its_own(margin: Any, replayed: None) -> None:
    """Autograd would let results that are one tensor belong to the last call alone."""
    features, labels = torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64)
    weights = [torch.ones(5, 8, requires_grad=True) for _ in range(5)]
    with torch.autocast("cpu", torch.bfloat16):
        losses = [
            ak.am_softmax_loss(features, weight, labels, backend="cuda", margin=margin, reduction="none")
            for weight in weights
        ]
    for loss, weight in zip(losses, weights, strict=True):
        assert weight.grad is None
        loss.sum().backward()
        assert weight.grad is not None and not weight.grad.any()


def test_programs_keep_no_memory(replayed: None) -> None:
    for seed in range(4):
        with replayed_triton.Hoard() as hoard:
            ours(torch.bfloat16, *BY_NAME["plain"].tensors(torch.float32, seed), reduction="mean")
        made = hoard.forget()
        gc.collect()
        assert len(made) > 10 and not any(each() is not None for each in made)
    assert all(programs("forward_loss") + programs("backward_loss"))


def test_a_launch_that_fails(replayed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it is repeated."""
    tensors = BY_NAME["plain"].tensors(torch.float32)
    for _ in range(3):
        ours(torch.bfloat16, *tensors)
    library = cuda._library(torch.device("cpu"))
    monkeypatch.setitem(library._functions, "ak_cosine_exp", lambda *_: b"out of luck")
    with pytest.raises(RuntimeError, match="ak_cosine_exp: out of luck"):
        ours(torch.bfloat16, *tensors)


def _unless_it_fails(function: Callable[[], str | None]) -> str | None:
    try:
        return function()
    except (AssertionError, RuntimeError):  # what comes after asks the device that is not there
        return None


def alone(function: Callable[..., tuple[Tensor, ...]]) -> replay.Replayed:
    return replay.Replayed(function, lambda *_: ())


def test_operators_of_pytorch() -> None:
    """New tensors, in-place ones, views, outputs, results that are inputs or parts of them, under autocast too."""

    def function(a: Tensor, b: Tensor, factor: float) -> tuple[Tensor, ...]:
        product = a @ b.T
        out = a.new_empty(4, 6)
        torch.mul(product[:2, :3].T, factor, out=out[1:4, :4:2])
        out[1:4, 1:4:2] = product[:3, 1:].to(out.dtype)
        out[0].zero_()
        out[1:, 4:] = product.sum()
        return product, out, a, out[1:], a.new_empty(0), product.to(torch.float64)

    repeated = alone(function)
    for seed in range(4):
        a, b = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)), torch.full((3, 5), float(seed))
        with torch.autocast("cpu", torch.bfloat16):
            actual, exact = repeated(a, b, 2.0), function(a, b, 2.0)
        for got, expected in zip(actual, exact, strict=True):
            assert got.dtype == expected.dtype and torch.equal(got, expected)
    assert [each is not None for each in repeated._programs.values()] == [True]


def test_results_in_one_memory() -> None:
    """Buffers, an empty one and some that were used as tensors; and a function that is given them."""

    def make(a: Tensor) -> tuple[Tensor, ...]:
        double, single = a.new_empty(3, 5, dtype=torch.float64), a.new_empty(1, 7)
        torch.mul(a[:3, :5], 2, out=double)
        torch.add(a[:1, :7], 1, out=single)
        return a + 1, single[0], double, single.new_empty(0, 2), a.new_empty(2)

    def take(a: Tensor, single: Tensor, double: Tensor, empty: Tensor, unused: Tensor) -> tuple[Tensor, ...]:
        scratch = a.new_empty(3, 5, dtype=torch.float64)
        torch.mul(double, 3, out=scratch)
        return (a[0, 0] + single[2:5]).double() * double[:, 1::2].T, scratch.sum() + empty.sum(), single

    made, taken = replay.Replayed(make, lambda *_: (), packed=1), alone(take)
    memory = []
    for seed in range(6):
        a = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
        one, rest = made(a)
        unpacked, exact = rest.unpacked(), make(a)
        assert torch.equal(one, exact[0]) and all(map(torch.equal, unpacked[:-1], exact[1:-1]))
        assert [(each.shape, each.dtype) for each in unpacked] == [(each.shape, each.dtype) for each in exact[1:]]
        assert all(map(torch.equal, taken(a, rest), take(a, *exact[1:])))
        memory.append(rest)
    assert len({each.memory.data_ptr() for each in memory}) == 6  # one for each call, while it is used
    assert len({each.layout for each in memory}) == 1 and len({id(each.layout) for each in memory}) == 3
    assert len({len(each.memory) for each in memory}) == 1
    assert list(map(bool, taken._programs.values())) == [True]


def test_results_that_are_no_buffers_of_their_own() -> None:
    """What was given, what a step made, a part, another dtype, not contiguous, twice the same, returned by itself too."""

    def parts(a: Tensor) -> Tensor:
        return torch.add(a, 1, out=a.new_empty(3, 4))

    for function in (
        lambda a: (a, a),
        lambda a: (a, a + 1),
        lambda a: (a, parts(a)[1:]),
        lambda a: (a, parts(a).view(torch.int32)),
        lambda a: (a, parts(a).T),
        lambda a: (a, *[parts(a)] * 2),
        lambda a: (*[parts(a)] * 2,),
    ):
        repeated = replay.Replayed(function, lambda *_: (), packed=1)
        for _ in range(4):
            a = torch.randn(3, 4)
            (first, rest), exact = repeated(a), function(a)
            assert torch.equal(first, exact[0]) and all(map(torch.equal, rest.unpacked(), exact[1:]))
        assert list(repeated._programs.values()) == [None]


def test_what_is_not_understood() -> None:
    memory = torch.zeros(8)
    elsewhere = torch.zeros(3)

    def makes_two(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return tuple(a.sort())

    def takes_a_tensor_from_elsewhere(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return (a + elsewhere[0],)

    def takes_a_list(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat([a, b]),)

    for function in (makes_two, takes_a_tensor_from_elsewhere, takes_a_list):
        repeated = alone(function)
        for seed in range(4):
            a, b = torch.full((2,), float(seed)), torch.ones(2)
            assert all(map(torch.equal, repeated(a, b), function(a, b)))
            elsewhere += 1
        assert list(repeated._programs.values()) == [None], function
    # Two inputs in one memory, of which an address may be either's.
    repeated = alone(lambda a, b: (a + b,))
    for _ in range(4):
        assert torch.equal(*repeated(memory[:4], memory[4:]), torch.zeros(4))
    assert list(repeated._programs.values()) == [None]
    for _ in range(4):
        assert torch.equal(*repeated(memory[:4], torch.ones(4)), torch.ones(4))
    repeated = alone(lambda a, b: (a + b,))
    array = memory.numpy()
    for _ in range(4):  # interleaved, and each with a storage of its own
        a, b = (torch.from_numpy(array[start : start + 6]) for start in (0, 1))
        assert torch.equal(*repeated(a, b), torch.zeros(6))
    assert list(repeated._programs.values()) == [None]


def test_one_thread_notes_at_a_time() -> None:
    """Another would leave PyTorch's flags of the process as if a mode were still entered."""
    entered, leave = threading.Event(), threading.Event()

    def slow(a: Tensor) -> tuple[Tensor, ...]:
        if replay.recorder() is not None:
            entered.set()
            assert leave.wait(60)
        return (a + 1,)

    def twice() -> None:
        for _ in range(2):
            noted(torch.zeros(2))

    noted, other = alone(slow), alone(lambda a: (a + 2,))
    thread = threading.Thread(target=twice)
    thread.start()
    try:
        assert entered.wait(60)
        for _ in range(4):
            assert torch.equal(*other(torch.zeros(2)), torch.full((2,), 2.0))
        assert not other._programs
    finally:
        leave.set()
        thread.join()
    assert all(noted._programs.values()) and len(noted._programs) == 1
    other(torch.zeros(2))
    assert all(other._programs.values()) and len(other._programs) == 1
    assert not is_in_torch_dispatch_mode()


def test_a_value_on_the_device_is_not_read() -> None:
    recorder = replay.Recorder([torch.zeros(3)])
    value = torch.ones(1)
    with recorder:
        assert replay.recorder() is recorder
        value.item()  # the host's own
        assert recorder._understood
        seen: list[Any] = []
        thread = threading.Thread(target=lambda: seen.append(replay.recorder()))
        thread.start()
        thread.join()
        assert seen == [None]
        with pytest.raises(RuntimeError, match="meta"):
            torch.ones(1, device="meta").item()
    assert replay.recorder() is None
    recorder.address(value.data_ptr())
    assert recorder.program(()) is None


def test_an_error_leaves_nothing_behind() -> None:
    def function(a: Tensor, fail: list[bool]) -> tuple[Tensor, ...]:
        if failing:
            raise ValueError("no")
        return (a + 1,)

    failing: list[int] = []
    repeated = replay.Replayed(lambda a: function(a, []), lambda *_: ())
    for step in range(6):
        if step in (1, 2):
            failing.append(1)
            with pytest.raises(ValueError, match="no"):
                repeated(torch.zeros(2))
            assert replay.recorder() is None
            failing.clear()
        else:
            assert torch.equal(*repeated(torch.full((2,), float(step))), torch.full((2,), step + 1.0))
    assert all(repeated._programs.values())


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_PROGRAMS", 3)
    repeated = alone(lambda a: (a + 1,))
    for size in range(1, 20):
        for _ in range(3):
            assert torch.equal(*repeated(torch.zeros(size)), torch.ones(size))
            assert len(repeated._programs) <= len(repeated._seen) <= 3


def test_a_described_address_is_a_whole_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's versions differ in what one holds beside its base."""
    pytest.importorskip("triton")
    from triton.tools.tensor_descriptor import TensorDescriptor

    from amsoftmax_kernels.backends import triton, triton_launch

    right = TensorDescriptor(torch.zeros(16, 32), [16, 32], [32, 1], [8, 16])
    right.of_a_later_version = 7
    fields = {name: value for name, value in vars(right).items() if name != "base"}
    again = triton_launch._Operand(0, 0, 0, fields).at(48)
    assert isinstance(again, TensorDescriptor) and vars(again).keys() == vars(right).keys()
    assert again.base.data_ptr() == 48 and again.shape == [16, 32] and again.of_a_later_version == 7
    monkeypatch.setattr(triton, "_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for version, served in (("3.4.0", False), ("3.5.1", False), ("3.6.0", True), ("3.10.1+git", True), ("4.0.0", True)):
        monkeypatch.setattr(triton.triton, "__version__", version)
        assert (f"this is {version}" in (_unless_it_fails(triton.unavailable_reason) or "")) != served


def test_triton_launches_the_same() -> None:
    """Its dispatch and its launcher run as on a GPU, in a process without the interpreter; kernels are not launched."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", replayed_triton.__name__], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("launches the same") == len(replayed_triton.OPTIONS) + 4


@pytest.mark.gpu
@pytest.mark.parametrize("save_bytes", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_on_a_gpu(backend: str, save_bytes: int | None) -> None:
    """One step after the other, all at once on the GPU, and in a CUDA graph that is captured while repeating."""
    reason = ak.backends.unavailable_reason(backend)
    if reason is not None:
        pytest.skip(reason)
    device = torch.device("cuda")
    loaded = ak.backends.load(backend)
    loaded.fused.forget()  # type: ignore[attr-defined]

    def step(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, w = (each.detach().requires_grad_() for each in tensors[:2])
        with torch.autocast("cuda", torch.bfloat16):
            loss = ak.am_softmax_loss(x, w, tensors[2], backend=backend, save_bytes=save_bytes)
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    given = [
        tuple(each.to(device) for each in Case("", "", 256, 1000, 512).tensors(torch.float32, seed)) for seed in range(8)
    ]
    results = [step(each) for each in given]
    programs = loaded.fused._replayed["forward_loss"]._programs.values()  # type: ignore[attr-defined]
    assert all(programs)
    assert not any(getattr(step, "__name__", "") == "by_launcher" for each in programs for step in each._steps)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(given[3])
    graph.replay()
    assert all(map(torch.equal, captured, results[3]))
    loaded.fused.forget()  # type: ignore[attr-defined]
    for tensors, actual in zip(given, results, strict=True):
        loaded.fused.forget()  # type: ignore[attr-defined]
        assert all(map(torch.equal, step(tensors), actual))
        assert not math.isnan(actual[0].item())
