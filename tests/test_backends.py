from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import amsoftmax_kernels as ak
from amsoftmax_kernels import __main__ as command
from amsoftmax_kernels import backends
from amsoftmax_kernels.backends import products, shard
from amsoftmax_kernels.backends.budget import kept_classes
from amsoftmax_kernels.backends.host_memory import advise_huge_pages

from .cases import CASES, relative, traits

CPU = torch.device("cpu")


def test_available_backends() -> None:
    names = ak.available_backends()
    assert names[-2:] == ["chunked", "reference"]
    assert set(names) <= set(backends.NAMES)


def test_the_default_on_a_cpu_is_chunked() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert backends.choose(None, traits(CPU, dtype)) == "chunked"


def test_a_missing_backend_says_why() -> None:
    for name in set(backends.NAMES) - set(ak.available_backends()):
        with pytest.raises(ValueError, match=f"backend '{name}' cannot run here: .*available: .*chunked"):
            backends.choose(name, traits(CPU, torch.float32))


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_product(onednn: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: onednn)
    for M, N, K in ((1, 1, 1), (65, 33, 17), (128, 7, 300)):
        a, b = torch.randn(M, K, dtype=dtype), torch.randn(K, N, dtype=dtype)
        assert relative(products.product_nt(a, b.T), a.double() @ b.double()) < torch.finfo(dtype).eps * 10
        assert relative(products.product_nt(a.T.contiguous().T, b.T.contiguous()), a.double() @ b.double()) < 1e-6


@pytest.mark.parametrize("onednn", [True, False])
def test_either_product_gives_the_loss(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: onednn and torch.backends.mkldnn.is_available())
    features, weight, labels, _ = CASES[0].tensors(torch.float32)
    expected = ak.reference.am_softmax_loss(features.double(), weight.double(), labels)
    assert relative(ak.am_softmax_loss(features, weight, labels), expected) < 2e-6


@pytest.mark.parametrize(("batch", "classes"), [(1, 10), (256, 100_000), (4096, 1000), (0, 10)])
def test_kept_bytes_stay_within_the_budget(batch: int, classes: int) -> None:
    chunk = shard._chunk_size(batch, 512, CPU)
    assert chunk > 0 and chunk % 64 == 0
    for budget in (0, 1, 10**6, 10**8, 10**12):
        kept = kept_classes(batch, classes, torch.float32, budget, chunk)
        assert kept * batch * 4 <= budget and (kept == classes or kept % chunk == 0)
    assert kept_classes(batch, classes, torch.float32, 10**12, chunk) == classes


def test_save_bytes_bounds_what_is_kept(small_chunks: None) -> None:
    features, weight, labels, _ = CASES[0].tensors(torch.float32)
    x = features.clone().requires_grad_()
    for budget in (0, 10_000, 1 << 30):
        saved: list[int] = []

        def pack(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            if tensor.dim() == 2 and tensor.shape[1] == CASES[0].B and tensor.shape[0] > 10:
                saved.append(tensor.numel() * 4)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ak.am_softmax_loss(x, weight, labels, save_bytes=budget)
        assert sum(saved) <= budget and (budget < 1 << 30 or sum(saved) == CASES[0].B * CASES[0].C * 4)


def test_huge_pages_change_nothing() -> None:
    buffer = torch.arange(3 << 20, dtype=torch.float64)
    copy = buffer.clone()
    assert torch.equal(advise_huge_pages(buffer), copy)
    assert advise_huge_pages(torch.empty(0)).numel() == 0


def test_the_command_reports_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    for name in backends.NAMES:
        assert name in printed
    assert torch.__version__ in printed and printed.count("self-test passed") == len(ak.available_backends())


def test_the_command_fails_on_a_wrong_backend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shard, "LOG2E", 1.0)
    assert command.main([]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_the_package_is_run_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "amsoftmax_kernels"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "chunked" in done.stdout, done.stderr


def test_importing_takes_no_longer_than_it_must() -> None:
    """Dynamo and DTensor take longer to import than torch does, and a plain head needs neither."""
    program = """
import sys, torch
before = set(sys.modules)
import amsoftmax_kernels as ak
x = torch.randn(6, 8, requires_grad=True)
ak.AMSoftmaxLoss(8, 50)(x, torch.arange(6)).backward()
ak.am_softmax_loss(x, torch.randn(50, 8), torch.arange(6), scale=torch.tensor(20.0), margin=torch.rand(50))
print(sorted({"torch._dynamo", "torch.distributed.tensor", "numpy", "triton"} & (set(sys.modules) - before)))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stdout + result.stderr


def test_without_numpy_nothing_is_said() -> None:
    """PyTorch itself warns as it is imported."""
    program = """
import sys, warnings
sys.modules["numpy"] = None
warnings.simplefilter("ignore")
import torch
warnings.simplefilter("error")
import amsoftmax_kernels as ak
x = torch.randn(6, 8, requires_grad=True)
for head in (ak.AMSoftmaxLoss(8, 50), ak.AMSoftmaxLoss(8, 50, torch.tensor(20.0), torch.rand(50), backend="reference")):
    head(x, torch.arange(6)).backward()
print(ak.available_backends()[-2:], ak.insightface.__name__, ak.optim.__name__)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
