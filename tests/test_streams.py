"""Chunks of classes on threads of their own: the same bits for any number of them, the caller's left alone."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends import shard, streams

B, D, C = 24, 16, 1100
OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": 200.0, "save_bytes": 0},
    {"normalize_features": False, "interclass_filter": 0.3},
    {"margin": lambda t, labels, norm: t - 0.01 * norm},
]


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves PyTorch's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def step(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tensor, ...]:
    """Loss and gradients of a problem of many chunks."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for n in (B, C))
    labels = torch.randint(C, (B,), generator=generator)
    loss = ak.am_softmax_loss(x, w, labels, backend="chunked", **options)
    return (loss.detach(), *torch.autograd.grad(loss, (x, w)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "recomputed", "filtered", "function"])
def test_the_bits_do_not_depend_on_the_threads(
    options: dict[str, Any], dtype: torch.dtype, small_chunks: None, threads: None
) -> None:
    results = []
    for count in (1, 2, 3, 5, 1):
        torch.set_num_threads(count)
        results.append(step(dtype, **options))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_the_callers_threads_stay_as_they_were(small_chunks: None, threads: None) -> None:
    for count in (3, 2):
        torch.set_num_threads(count)
        step()
        assert torch.get_num_threads() == count
        with ThreadPoolExecutor(1) as pool:  # a thread that is made later
            assert pool.submit(torch.get_num_threads).result() == count
    torch.set_num_threads(4)
    assert set(streams.run(8, 8, lambda items: torch.get_num_threads())) == {1}


def test_several_threads_call_at_once(small_chunks: None, threads: None) -> None:
    torch.set_num_threads(2)
    expected = step()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: step(), range(12)):
            assert all(map(torch.equal, found, expected))


def test_streams_depend_on_the_shapes_alone(threads: None) -> None:
    cpu = torch.device("cpu")
    for count in (1, 2):
        torch.set_num_threads(count)
        assert shard.stream_count(256, 512, 100_000, cpu) == 16
        assert shard.stream_count(4096, 512, 1_000_000, cpu) == 8
        assert shard.stream_count(64, 128, 1_000, cpu) == 1  # operations are split instead
        assert shard.stream_count(256, 512, 100_000, torch.device("meta")) == 1
    assert shard.chunk_size(256, 512, 10_000, cpu) == 1280  # eight chunks


def test_streams_take_their_items_in_order() -> None:
    assert streams.run(3, 8, lambda items: list(items)) == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_the_first_error_comes_out_and_the_others_stop(threads: None) -> None:
    torch.set_num_threads(2)
    done: list[int] = []

    def work(items: Iterable[int]) -> None:
        for item in items:
            if item == 3:
                raise ZeroDivisionError("three")
            time.sleep(0.001)
            done.append(item)

    with pytest.raises(ZeroDivisionError, match="three"):
        streams.run(4, 10_000, work)
    assert len(done) < 9_000
    assert streams.run(2, 2, list) == [[0], [1]]  # and it goes on


def test_modes_are_the_callers(threads: None) -> None:
    torch.set_num_threads(2)

    def modes(items: Iterable[int]) -> tuple[Any, ...]:
        return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
                torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())  # fmt: skip

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert set(streams.run(2, 2, modes)) == {modes([])}
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            assert set(streams.run(2, 2, modes)) == {modes([])}
    finally:
        torch.set_default_dtype(torch.float32)


def test_inference_mode_and_autocast(small_chunks: None, threads: None) -> None:
    torch.set_num_threads(2)
    x, w, labels = torch.randn(B, D), torch.randn(C, D), torch.randint(C, (B,))
    expected = ak.am_softmax_loss(x, w, labels)
    with torch.inference_mode():
        assert torch.equal(ak.am_softmax_loss(x, w, labels), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(ak.am_softmax_loss(x, w, labels), expected, rtol=1e-2)
    step()  # the workspace that inference mode has used serves gradients too


def in_another_process(expected: list[Tensor], pipe: Any) -> None:
    torch.set_num_threads(2)
    shard._chunk_size, shard._SMALL = lambda batch, dim, device: 32, 0
    pipe.send(all(map(torch.equal, step(), expected)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(method: str, monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """A fork finds a pool whose threads it has not."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    monkeypatch.setattr(shard, "_chunk_size", lambda batch, dim, device: 32)
    monkeypatch.setattr(shard, "_SMALL", 0)
    torch.set_num_threads(2)
    expected = [each.detach() for each in step()]
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    process = context.Process(target=in_another_process, args=(expected, there))
    process.start()
    there.close()
    assert here.poll(120) and here.recv()
    process.join(60)
    assert process.exitcode == 0


def test_interrupted() -> None:
    """Ctrl-C ends a step."""
    program = """
import signal, torch, amsoftmax_kernels as ak, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started to ignore it
torch.set_num_threads(2)
x, w, labels = torch.randn(512, 64, requires_grad=True), torch.randn(20_000, 64, requires_grad=True), torch.arange(512)
ak.am_softmax_loss(x, w, labels).backward()
print("ready", flush=True)
try:
    while True:
        ak.am_softmax_loss(x, w, labels).backward()
except KeyboardInterrupt:
    ak.am_softmax_loss(x, w, labels).backward()
    print("interrupted", threading.active_count() <= 4, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=120)[0] == "interrupted True\n"
        finally:
            process.kill()
    assert process.returncode == 0


def run_program(program: str) -> str:
    head = """
import atexit, threading, time, torch, amsoftmax_kernels as ak
torch.set_num_threads(2)
x, w, labels = torch.randn(256, 512, requires_grad=True), torch.randn(2304, 512, requires_grad=True), torch.arange(256)
def step():
    loss = ak.am_softmax_loss(x, w, labels)
    loss.backward()
    return loss.item()
"""
    done = subprocess.run([sys.executable, "-c", head + program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_thread_trains_on_when_the_main_one_has_ended() -> None:
    program = """
def train():
    time.sleep(0.3)
    print(len({step() for _ in range(3)}), flush=True)
threading.Thread(target=train).start()
"""
    assert run_program(program) == "1\n"
    assert run_program("atexit.register(lambda: print(step() > 0, flush=True))") == "True\n"


def test_threads_that_cannot_be_started() -> None:
    """The error comes out, the caller's threads stay as they were, and the next step works."""
    program = """
start = threading.Thread.start
def failing(self):
    if self.name.endswith("-1"):
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = failing
try:
    step()
except RuntimeError as error:
    print(error)
print(torch.get_num_threads())
threading.Thread.start = start
print(step() > 0, flush=True)
"""
    assert run_program(program) == "can't start new thread\n2\nTrue\n"


def test_another_default_device(threads: None) -> None:
    """Temporaries lie where the centres do."""
    torch.set_num_threads(1)
    x, w, labels = torch.randn(B, D), torch.randn(C, D).bfloat16(), torch.randint(C, (B,))
    streams._kept.__dict__.clear()
    expected = ak.am_softmax_loss(x, w, labels, interclass_filter=0.99)
    streams._kept.__dict__.clear()
    with torch.device("meta"):
        assert torch.equal(ak.am_softmax_loss(x, w, labels, interclass_filter=0.99), expected)


def test_the_workspace_is_bounded() -> None:
    like = torch.empty(0)
    small = streams.workspace("test", (10, 20), like)
    assert streams.workspace("test", (5, 3), like).data_ptr() == small.data_ptr()
    for name in "abc":
        assert streams.workspace(name, (streams.WORKSPACE_BYTES // 8,), like).dim() == 1
    assert streams.workspace("test", (streams.WORKSPACE_BYTES,), like).numel() == streams.WORKSPACE_BYTES
    kept: dict[object, Tensor] = streams._kept.buffers
    assert 0 < sum(each.nbytes for each in kept.values()) <= streams.WORKSPACE_BYTES
    found: list[bool] = []
    other = threading.Thread(
        target=lambda: found.append(streams.workspace("test", (2,), like).data_ptr() != small.data_ptr())
    )
    other.start()
    other.join()
    assert found == [True]
