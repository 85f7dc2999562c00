from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: their threads must not fight
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what older PyTorch wants of deterministic products
os.environ["AMSOFTMAX_KERNELS_PROOF"] = "0"  # each kind of call would start a process first: test_first_contact.py does
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: the Triton backend then serves CPU tensors

from amsoftmax_kernels import backends
from amsoftmax_kernels.backends import chunking, shard
from amsoftmax_kernels.backends.cuda import library as cuda_library

from .cases import CHUNK
from .emulation import emulated as compiled
from .emulation import seed, serve
from .ranks import Ranks


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few classes, so that small problems take several, in streams."""
    monkeypatch.setattr(shard, "_chunk_size", lambda batch, dim, device: CHUNK // 2)
    monkeypatch.setattr(shard, "_SMALL", 0)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the backends on fused kernels."""
    monkeypatch.setattr(chunking, "chunk_size", lambda batch, dim: CHUNK)


@pytest.fixture(scope="session")
def emulated_library() -> cuda_library.Library:
    return compiled()


@pytest.fixture
def emulated(emulated_library: cuda_library.Library, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(emulated_library, monkeypatch)


@pytest.fixture(params=["triton", "cuda"])
def fused_backend(request: pytest.FixtureRequest) -> str:
    """The backends on fused kernels by name: Triton's interpreted where there is no GPU, the C++ one always emulated."""
    reason = backends.load("triton").unavailable_reason()
    if request.param == "cuda":
        request.getfixturevalue("emulated")
    elif reason is not None:
        pytest.skip(f"the Triton backend cannot run here: {reason}")
    return str(request.param)


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps of Triton's kernels to interpret, where tiles' edges are not what is tested."""
    if not torch.cuda.is_available():
        backend: Any = backends.load("triton")
        config = dataclasses.replace(backend._INTERPRETED, rows=64, classes=128, depth=64)
        gradient = dataclasses.replace(backend._INTERPRETED_GRADIENT, rows=64, classes=64, columns=64)
        monkeypatch.setattr(backend, "_config", lambda *_: config)
        monkeypatch.setattr(backend, "_gradient_config", lambda _: gradient)


@pytest.fixture(scope="session")
def hopper_library() -> cuda_library.Library:
    """The emulated library with Hopper's own kernels."""
    return compiled(hopper=True)


@pytest.fixture
def hopper(hopper_library: cuda_library.Library, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hopper_library.has_hopper
    serve(hopper_library, monkeypatch)
    seed(hopper_library, 0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seeds", type=int, default=2, help="times that Hopper's kernels are emulated, in other orders of events"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "order" in metafunc.fixturenames:
        metafunc.parametrize("order", range(metafunc.config.getoption("--seeds")))


@pytest.fixture(scope="session", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Processes to be ranks: eight on the CPU, and one a GPU where there are several."""
    gpus = torch.cuda.device_count()
    if request.param == "nccl" and gpus < 2:
        pytest.skip("NCCL takes a GPU a rank: there is one")
    started = Ranks(8 if request.param == "gloo" else min(gpus, 8), request.param)
    yield started
    started.close()


@pytest.fixture(autouse=True)
def choose_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend is remembered from a test that changed what there is."""
    monkeypatch.setattr(backends, "_choices", {})


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that meet in tiny steps wait long for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every new tensor starts as NaN: what a kernel forgets to write shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))
