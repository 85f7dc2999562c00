"""The first time a backend is chosen for a GPU it proves itself in a process of its own; here a CPU stands for the GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends import proof

from .cases import Case, traits
from .processes import ended
from .ranks import Ranks

pytest.importorskip("triton")
from amsoftmax_kernels import backends
from amsoftmax_kernels.backends import triton as backend

pytestmark = pytest.mark.skipif(not backend._interpreted(), reason="takes the interpreter: a GPU's own proof is its test")
CARD = "NVIDIA Test (sm_90)"
CPU = torch.device("cpu")

# What a child does before it proves: the backend as it is, or with a fault.
RIGHT = "pass"
FAULTS = {
    "compiler": (
        "from triton.compiler.errors import CompilationError\n"
        "def forward(*_): raise CompilationError('', None, 'no such\\n  instruction')\nbackend.forward = forward",
        "CompilationError",
    ),
    "shared memory": (
        "from triton.runtime.errors import OutOfResources\n"
        "def forward(*_): raise OutOfResources(262144, 232448, 'shared memory')\nbackend.forward = forward",
        "out of resource: shared memory",
    ),
    "wrong gradient": (
        "backward = backend.backward\n"
        "backend.backward = lambda *a: (lambda x, w, s: (x, w * 1.5, s))(*backward(*a))",
        "the gradient of weight differs by 5.0e-01",
    ),
    "segmentation fault": (
        "import os, signal\nbackend.forward = lambda *_: os.kill(os.getpid(), signal.SIGSEGV)",
        "its proof ended with signal SIGSEGV",
    ),
    "garbage": (
        "import os\nbackend.forward = lambda *_: (print('no verdict', flush=True), os._exit(7))",
        "its proof ended with exit status 7",
    ),
}  # fmt: skip


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CPU tensors are treated as a GPU's; the cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backends, "_candidates", lambda device: ("triton", "chunked"))
    monkeypatch.setattr(backends, "_proves", lambda device: True)
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(proof, "describe", lambda device: CARD)
    monkeypatch.setenv(proof.SWITCH, "1")
    forget(monkeypatch)
    return tmp_path / "amsoftmax_kernels" / "proofs"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process has it."""
    monkeypatch.setattr(proof, "_known", {})
    monkeypatch.setattr(backends, "_choices", {})


def plant(fault: str, monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    """What children do from here on; each writes a line to ``log``."""
    program = f"""
from pathlib import Path
with open({str(log)!r}, "a") as file: print("proof", file=file)
from amsoftmax_kernels.backends import comparison, load, proof
comparison.EMULATED_SIZES = (20, 50)
backend = load("triton")
{textwrap.dedent(fault)}
raise SystemExit(proof.main())
"""
    monkeypatch.setattr(proof, "COMMAND", [sys.executable, "-c", program])


def answer(failure: str | None, monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    """Children that prove nothing, where what becomes of their verdict is tested."""
    text = json.dumps({"undecided": None, "failure": failure})
    program = f"import time; time.sleep(0.5); print('proof', file=open({str(log)!r}, 'a')); print({text!r})"
    monkeypatch.setattr(proof, "COMMAND", [sys.executable, "-c", program])


def proofs(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def step(backend_name: str | None = None, **options: Any) -> tuple[Tensor, ...]:
    features, weight, labels, _ = Case("", "", B=5, C=20, D=16).tensors(torch.float32)
    x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = ak.am_softmax_loss(x, w, labels, backend=backend_name, **options)
    return (loss.detach(), *torch.autograd.grad(loss, (x, w)))


TRAITS = traits(CPU, torch.float32)


def test_a_backend_that_is_right_serves(gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    plant(RIGHT, monkeypatch, log)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="amsoftmax_kernels")
        first = step()
        assert all(map(torch.equal, first, step())) and all(map(torch.equal, first, step("triton")))
        assert backends.choose(None, TRAITS) == "triton" and proofs(log) == 1
        forget(monkeypatch)
        step()
    assert proofs(log) == 1
    answer(None, monkeypatch, log)
    (path,) = gpu.glob("*.json")
    verdict = json.loads(path.read_text())
    assert verdict["failure"] is None and verdict["card"] == CARD and verdict["traits"]["width"] == 16
    assert {"driver", "torch", "triton", "package", "sources"} <= verdict.keys()
    path.write_text("{")  # cut short: made anew
    forget(monkeypatch)
    step()
    assert proofs(log) == 2 and json.loads(path.read_text()) == verdict
    monkeypatch.setattr(proof, "_driver", lambda: "another driver")
    forget(monkeypatch)
    step()
    assert proofs(log) == 3 and len(list(gpu.glob("*.json"))) == 2
    with torch.inference_mode():  # other options are proven by themselves
        features, weight, labels, _ = Case("", "", B=5, C=20, D=16).tensors(torch.float32)
        ak.am_softmax_loss(features, weight, labels, interclass_filter=0.5, return_predictions=True, scale=100.0)
    assert proofs(log) == 4


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_and_chunked_serves(fault: str, gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, cause = FAULTS[fault]
    plant(program, monkeypatch, tmp_path / "log")
    with pytest.warns(RuntimeWarning) as told:
        results = step()
    (message,) = [str(each.message) for each in told if "amsoftmax_kernels" in str(each.message)]
    assert f"backend 'triton' failed its proof on {CARD}: " in message and cause in message and "\n" not in message
    assert message.endswith("'chunked' serves instead")
    assert all(map(torch.equal, results, step("chunked")))
    with warnings.catch_warnings():  # once a process
        warnings.filterwarnings("error", message="amsoftmax_kernels")
        step()
    with pytest.raises(RuntimeError, match=f"'triton' failed its proof on {CARD[:11]}.*") as raised:
        step("triton")
    assert cause in str(raised.value)
    (path,) = gpu.glob("*.json")
    assert cause in json.loads(path.read_text())["failure"] and f"(kept in {gpu}: delete it to try again)" in message
    forget(monkeypatch)  # another process reads what has been found
    with pytest.raises(RuntimeError, match="failed its proof"):
        step("triton")
    assert proofs(tmp_path / "log") == 1


def test_a_hang_is_ended(gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it started, a compiler say."""
    program = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(600)
"""
    monkeypatch.setattr(proof, "COMMAND", [sys.executable, "-c", program])
    monkeypatch.setattr(proof, "SECONDS", 5.0)
    with pytest.warns(RuntimeWarning, match="its proof did not end in 5 s; 'chunked' serves instead"):
        step()
    assert not list(gpu.glob("*.json"))  # it may end the next time
    for pid in (tmp_path / "pids").read_text().split():
        assert ended(int(pid))


UNSTARTED = {
    "no such program": (["/nowhere/python"], "FileNotFoundError"),
    "it cannot import": ([sys.executable, "-c", "import nowhere"], "No module named 'nowhere'"),
    "the device is taken": (
        [sys.executable, "-c", 'print(\'{"undecided": "RuntimeError: busy", "failure": null}\')'],
        "RuntimeError: busy",
    ),
}


@pytest.mark.parametrize("why", UNSTARTED)
def test_where_no_process_can_try_it_is_tried_here(why: str, gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the caller is in the midst of; and a failure here is no other process's."""
    command, reason = UNSTARTED[why]
    monkeypatch.setattr(proof, "COMMAND", command)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert backends.choose(None, TRAITS) == "triton"
    assert len(list(gpu.glob("*.json"))) == 1
    forget(monkeypatch)
    for path in gpu.glob("*.json"):
        path.unlink()
    monkeypatch.setattr(backend, "backward", lambda *_: 1 / 0)
    with pytest.warns(RuntimeWarning, match=f"ZeroDivisionError.*in this process, as no other could try: .*{reason}"):
        assert backends.choose(None, TRAITS) == "chunked"
    assert not list(gpu.glob("*.json"))


@pytest.mark.parametrize("where", ["child", "here"])
def test_a_full_device_is_no_fault_of_the_backends(
    where: str, gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process could have no room for a context; this one has, or says so and keeps no verdict."""
    fault = "def full(*_): raise torch.OutOfMemoryError('no room')\nbackend.forward = full"
    plant(f"import torch\n{fault}", monkeypatch, tmp_path / "log")
    if where == "child":
        assert backends.choose(None, TRAITS) == "triton" and len(list(gpu.glob("*.json"))) == 1
        return

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(backend, "forward", full)
    with pytest.warns(RuntimeWarning, match="OutOfMemoryError: no room"):
        assert backends.choose(None, TRAITS) == "chunked"
    assert not list(gpu.glob("*.json"))


def test_two_processes_prove_once(gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    answer(None, monkeypatch, log)
    program = f"""
import torch
from amsoftmax_kernels import backends
from amsoftmax_kernels.backends import proof
proof.COMMAND, proof.describe, backends._proves = {proof.COMMAND!r}, lambda device: {CARD!r}, lambda device: True
backends._candidates = lambda device: ("triton", "chunked")
f = torch.float32
print(backends.choose(None, backends.Traits(torch.device("cpu"), f, f, f, 16, True, True, False, False)))
"""
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [each.communicate(timeout=120)[0].strip() for each in both] == ["triton"] * 2
    assert proofs(log) == 1


def test_a_cache_that_cannot_be_written(gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    answer(None, monkeypatch, tmp_path / "log")
    assert backends.choose(None, TRAITS) == backends.choose("triton", TRAITS) == "triton"
    assert proofs(tmp_path / "log") == 1


def test_cards_of_one_name_share_a_verdict(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (proof._facts("triton", TRAITS._replace(device=torch.device("cuda", i))) for i in (0, 3))
    assert first == second
    monkeypatch.setattr(proof, "describe", lambda device: "another card")
    assert proof._facts("triton", TRAITS) != first


def test_it_can_be_turned_off(gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("raise SystemExit(1)", monkeypatch, tmp_path / "log")
    monkeypatch.setenv(proof.SWITCH, "0")
    assert backends.choose(None, TRAITS) == "triton" and proofs(tmp_path / "log") == 0


def test_a_first_call_in_a_capture_is_an_error(gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(None, monkeypatch, tmp_path / "log")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call the loss once before it"):
        backends.choose(None, TRAITS)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    backends.choose(None, TRAITS)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backends.choose(None, TRAITS) == "triton"


def test_a_compiled_call_goes_through_the_same_door(gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer("a fault", monkeypatch, tmp_path / "log")
    head = ak.AMSoftmaxLoss(16, 20)
    x, labels = torch.randn(5, 16), torch.arange(5)
    torch._dynamo.reset()
    with pytest.warns(RuntimeWarning, match="'chunked' serves instead"):
        loss = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=True)(x, labels)
    assert proofs(tmp_path / "log") == 1 and torch.equal(loss, head(x, labels))


def test_what_no_kernel_serves_is_told_once(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    double = TRAITS._replace(compute_dtype=torch.float64, features_dtype=torch.float64, weight_dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match=r"served by 'chunked'.*'triton': .*torch\.float64"):
        assert backends.choose(None, double) == "chunked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(None, double) == backends.choose("chunked", double) == "chunked"
        assert backends.choose(None, double._replace(width=17)) == "chunked"
    monkeypatch.setattr(backend, "unavailable_reason", lambda: "needs compute capability 8.0")
    with pytest.warns(RuntimeWarning, match="needs compute capability"):
        assert backends.choose(None, TRAITS) == "chunked"


def test_nothing_is_built_that_was_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's candidates have the C++ backend only where a library is named; and to ask does not build."""
    monkeypatch.delenv("AMSOFTMAX_KERNELS_LIBRARY", raising=False)
    device = torch.device("cuda", 0)
    assert backends._candidates(device) == ("triton", "chunked", "reference")
    assert backends._candidates(torch.device("meta")) == ("chunked", "reference")
    monkeypatch.setenv("AMSOFTMAX_KERNELS_LIBRARY", "/somewhere/library.so")
    from amsoftmax_kernels.backends import cuda

    for has_hopper, expected in ((True, ("cuda", "triton")), (False, ("triton", "cuda"))):
        monkeypatch.setattr(cuda, "_has_hopper", lambda *_, has_hopper=has_hopper: has_hopper)
        assert backends._candidates(device)[:2] == expected


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        ((3, 5), (9, 0), "Triton 3.6 or newer"), ((3, 9), (9, 0), "newer than what was tried"), ((4, 0), (9, 0), "newer"),
        ((3, 6), (7, 5), "compute capability 8.0"), ((3, 6), (7, 0), "compute capability 8.0"),
        ((3, 6), (11, 0), "cannot compile for sm_110"), ((3, 7), (11, 0), None), ((3, 6), (9, 0), None),
        ((3, 8), (12, 0), None), ((3, 6), (8, 0), None), ((3, 6), (10, 3), None),
    ],
)  # fmt: skip
def test_what_is_not_supported(version: tuple[int, int], capability: tuple[int, int], reason: str | None) -> None:
    found = backend._unsupported(version, capability)
    assert found is None if reason is None else found is not None and reason in found


def test_the_lookup_is_short(gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once chosen, nothing is read, started or asked of a device."""
    answer(None, monkeypatch, tmp_path / "log")
    assert backends.choose(None, TRAITS) == backends.choose("triton", TRAITS) == "triton"
    for module, name in ((proof, "failure"), (backends, "unavailable_reason"), (backends, "refusal")):
        monkeypatch.setattr(module, name, lambda *_: 1 / 0)
    assert backends.choose(None, TRAITS) == backends.choose("triton", TRAITS) == "triton"


def _refused_on_one_rank() -> str:
    """What a rank is told whose backend is not the other's."""
    import torch.distributed as dist

    cause = "a fault" if dist.get_rank() == 1 else None
    with pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monkeypatch.setattr(backends, "_choices", {})
        monkeypatch.setattr(backends, "_candidates", lambda device: ("triton", "chunked"))
        monkeypatch.setattr(backends, "_proves", lambda device: True)
        monkeypatch.setattr(proof, "failure", lambda *_: cause)
        head = ak.ShardedAMSoftmaxLoss(16, 20)
        try:
            head(torch.randn(3, 16), torch.arange(3))
        except ValueError as error:
            return str(error)
    return "nothing"


def test_ranks_that_choose_differently_are_told(ranks: Ranks) -> None:
    first, second = ranks.run(2, _refused_on_one_rank)
    assert "rank 1 differs from this one's backend='triton'" in first
    assert "rank 0 differs from this one's backend='chunked'" in second
