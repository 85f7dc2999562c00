"""Which GPUs and dtypes the C++ backend serves, when it comes first, and what is said where it does not serve."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import pytest
import torch

import amsoftmax_kernels as ak
from amsoftmax_kernels import __main__ as command
from amsoftmax_kernels import backends
from amsoftmax_kernels.backends import cuda
from amsoftmax_kernels.backends.cuda import build
from amsoftmax_kernels.backends.cuda import library as cuda_library

from .cases import traits
from .cuda_kernels import CPU, NVCC


def _pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> torch.device:
    """A GPU of this capability, as far as choosing a backend goes."""
    for module, name in ((cuda, "_library"), (cuda_library, "library")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, functools.cache(getattr(function, "__wrapped__", function)))
    monkeypatch.setattr(cuda, "_failed", {})
    monkeypatch.setattr(cuda, "_has_hopper", functools.cache(getattr(cuda._has_hopper, "__wrapped__", cuda._has_hopper)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    return torch.device("cuda", 0)


def test_float32_is_served_where_pytorch_allows_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_builds", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    before = torch.get_float32_matmul_precision()
    try:
        for precision, served in (("highest", False), ("high", True)):
            torch.set_float32_matmul_precision(precision)
            assert (cuda.refusal(torch.device("cuda", 0), torch.float32) is None) == served
            assert cuda.refusal(torch.device("cuda", 0), torch.bfloat16) is None
    finally:
        torch.set_float32_matmul_precision(before)


def test_nvcc_is_looked_for_until_a_library_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a step asks, and takes a while."""
    looked: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(build, "missing", lambda *_: looked.append(None))
    loaded = functools.lru_cache(lambda arch: object())
    monkeypatch.setattr(cuda_library, "library", loaded)
    assert cuda.unavailable_reason() is None and len(looked) == 1
    loaded("90a")
    assert cuda.unavailable_reason() is None and len(looked) == 1


@pytest.mark.parametrize(("has_hopper", "headers"), [(True, True), (False, False), (False, True)])
def test_hopper_without_its_own_kernel_says_so(has_hopper: bool, headers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = _pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(cuda, "_builds", lambda device: True)
    monkeypatch.setattr(cuda, "_library", lambda device: type("Library", (), {"has_hopper": has_hopper}))
    monkeypatch.setattr(build, "find_cutlass", lambda: Path("include") if headers else None)
    assert cuda.refusal(device, torch.bfloat16) is None
    said = "did not compile" if headers else f"pip install {build.CUTLASS}"
    remark = cuda.remark()
    assert remark is None if has_hopper else remark is not None and said in remark
    monkeypatch.setenv("AMSOFTMAX_KERNELS_WITHOUT", "gradient_sm90")
    assert "AMSOFTMAX_KERNELS_WITHOUT leaves out gradient_sm90" in (cuda.remark() or "")
    _pretend(monkeypatch, (8, 0))
    assert cuda.remark() is None


@pytest.mark.parametrize("has_hopper", [True, False])
@pytest.mark.parametrize("prebuilt", [True, False])
@pytest.mark.parametrize("capability", [(9, 0), (8, 0), (10, 0)])
def test_hoppers_own_kernels_built_ahead_come_first(
    capability: tuple[int, int], prebuilt: bool, has_hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    device = _pretend(monkeypatch, capability)
    looked: list[object] = []
    monkeypatch.setattr(cuda, "_builds", lambda device: (looked.append(device), True)[1])
    monkeypatch.setattr(cuda, "_library", lambda device: type("Library", (), {"has_hopper": has_hopper}))
    monkeypatch.setattr(build, "prebuilt_name", lambda: "library.so" if prebuilt else "")
    monkeypatch.setattr(build, "missing", lambda *_: None)
    triton = backends.load("triton")
    monkeypatch.setattr(triton, "unavailable_reason", lambda: None)
    monkeypatch.setattr(triton, "refusal", lambda device, dtype: None)
    first = "cuda" if prebuilt and has_hopper and capability == (9, 0) else "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(None, traits(device, torch.bfloat16)) == first
        assert set(ak.available_backends()[:2]) == {"cuda", "triton"} and (prebuilt or not looked)  # nothing is built for it
        # What it does not serve, as float32 where TF32 is not allowed, goes to the next.
        monkeypatch.setattr(cuda, "refusal", lambda device, dtype: "it does not serve that")
        assert backends.choose(None, traits(device, torch.float32)) == "triton"
        assert backends.choose(None, traits(torch.device("meta"), torch.float32)) == "chunked"


def test_an_unsupported_card_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, (7, 5))
    assert "needs compute capability 8.0 or newer, but this GPU has 7.5" in (cuda.unavailable_reason() or "")
    assert "cuda" not in ak.available_backends()


@pytest.fixture
def broken_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> torch.device:
    """A GPU, as far as choosing a backend goes, for which nothing can be built."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "library.h").write_text("")
    (tmp_path / "csrc" / "broken.cu").write_text("this is not C++\n")
    monkeypatch.setattr(build, "sources", lambda: tmp_path / "csrc")
    monkeypatch.setattr(build, "cache", lambda: tmp_path / "cache")
    return _pretend(monkeypatch, (8, 0))


def test_a_library_that_cannot_be_loaded_is_told_once_and_triton_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is built in its place."""
    pytest.importorskip("triton")
    device = _pretend(monkeypatch, (9, 0))
    (tmp_path / "library.so").write_text("no library")
    monkeypatch.setenv("AMSOFTMAX_KERNELS_LIBRARY", str(tmp_path / "library.so"))
    monkeypatch.setattr(backends.load("triton"), "unavailable_reason", lambda: None)
    monkeypatch.setattr(backends.load("triton"), "refusal", lambda device, dtype: None)
    monkeypatch.setattr(build, "build", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="the CUDA library cannot be had, other backends serve:\n"):
        assert backends.choose(None, traits(device, torch.float16)) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(None, traits(device, torch.bfloat16)) == "triton"


@NVCC
@pytest.mark.filterwarnings("ignore:amsoftmax_kernels")
def test_a_failed_build_is_the_reason_and_not_tried_again(
    broken_sources: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for by name, or looked up: the compiler's words, and where the rest of them is."""
    builds: list[object] = []
    right = build.build
    monkeypatch.setattr(build, "build", lambda *args: (builds.append(None), right(*args))[1])
    assert "cuda" in ak.available_backends()  # nothing has been tried yet
    for device in (broken_sources, torch.device("cuda", 1)):
        with pytest.raises(ValueError, match=r"'cuda' cannot run here: .*broken\.cu.*error.*--arch 80 .* shows all"):
            backends.choose("cuda", traits(device, torch.float16))
        assert cuda.refusal(device, torch.bfloat16) is not None
    assert len(builds) == 1 and "cuda" not in ak.available_backends()


def test_what_ails_a_device_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full GPU may have room later, a file that is no library stays none."""
    device = _pretend(monkeypatch, (8, 0))
    ailing = [True]

    class Library:
        def check(self, device: torch.device) -> None:
            if ailing[0]:
                raise RuntimeError("out of memory")

    monkeypatch.setattr(cuda_library, "library", functools.cache(lambda arch: Library()))
    with pytest.warns(UserWarning, match="does not serve cuda:0:\nout of memory"):
        assert cuda.refusal(device, torch.float16) is not None
    ailing[0] = False
    assert cuda.refusal(device, torch.float16) is None


@NVCC
@pytest.mark.filterwarnings("ignore:amsoftmax_kernels")
def test_the_command_builds_nothing(
    broken_sources: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what would."""
    monkeypatch.setattr(backends, "NAMES", ("cuda", "reference"))
    monkeypatch.setattr(backends, "choose", lambda *_: "reference")
    monkeypatch.setattr(command, "_describe_gpu", lambda: "none")
    monkeypatch.setattr(command, "_tested", lambda name, device: (f"{name} is tested", False))
    monkeypatch.setattr(build, "build", lambda *_: 1 / 0)
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert "cuda       not built yet: backend='cuda' builds it" in printed and build.COMMAND in printed


def test_a_backend_that_serves_nothing_fails_its_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.load("chunked"), "refusal", lambda device, dtype: f"it does not serve {dtype}")
    assert command.self_test("chunked", CPU) == "it does not serve torch.float32"
