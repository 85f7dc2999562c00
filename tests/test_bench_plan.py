"""The plan of a run: its memory against what training steps really take, its bytes and its time against counts by hand."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from amsoftmax_kernels import ShardedAMSoftmaxLoss
from amsoftmax_kernels.optim import FusedAdamW, FusedSGD
from bench.__main__ import main
from bench.plan import times as plan_time
from bench.plan.memory import Memory, Run, memory, smallest_ranks
from bench.train import log as train_log

from .ranks import Ranks

# Real tensors, 100 MB and more, decide; half a gigabyte and more in all.
C, D, B = 400_000, 128, 128
M_MMAP_THRESHOLD = -3  # glibc's malloc.h


@pytest.fixture(scope="module")
def fresh_ranks() -> Iterator[Ranks]:
    """Processes that no other test has left anything in."""
    started = Ranks(2)
    yield started
    started.close()


CASES = {
    "momentum": {},
    "momentum and weight decay, nothing kept": {"weight_decay": True, "save_bytes": 0},
    "adamw": {"optimizer": "adamw"},
    "adamw, nothing kept": {"optimizer": "adamw", "save_bytes": 0},
    "sgd, half kept": {"optimizer": "sgd", "save_bytes": 50 << 20},
    "sampled": {"sample_rate": 0.1},
    "sampled, a third, corrected": {"sample_rate": 0.33, "sampling_correction": True},
    "fused sgd": {"optimizer": "fused-sgd"},
    "fused sgd, nothing kept": {"optimizer": "fused-sgd", "weight_decay": True, "save_bytes": 0},
    "fused adamw, half": {"sample_rate": 0.5, "optimizer": "fused-adamw"},
    "sub-centres": {"subcentres": 2},
}
FEW = ("momentum", "sampled, a third, corrected", "fused sgd, nothing kept")  # on two ranks each time


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks of resident memory are Linux's")
@pytest.mark.parametrize(
    ("size", "case"),
    [(1, case) for case in CASES] + [pytest.param(2, case, marks=[] if case in FEW else pytest.mark.slow) for case in CASES],
)
def test_memory_is_what_training_takes(fresh_ranks: Ranks, size: int, case: str) -> None:
    options: dict[str, Any] = CASES[case]
    run = Run(C // options.get("subcentres", 1), D, B // size, size, **options)
    predicted = memory(run).total
    threads = max(torch.get_num_threads() // size, 1)
    # The least of three, if need be: a library may set up something at its first use.
    attempts: list[list[int]] = []
    while len(attempts) < 3 and (not attempts or max(map(min, zip(*attempts, strict=True))) > 1.05 * predicted):
        attempts.append(fresh_ranks.run(size, measure, run, threads))
    for measured in map(min, zip(*attempts, strict=True)):
        assert abs(predicted - measured) <= 0.1 * measured, (
            f"{predicted / 1e6:.0f} MB predicted, {measured / 1e6:.0f} measured"
        )


def measure(run: Run, threads: int) -> int:
    """Bytes at the peak of two steps of training, above what the process had before there was a head."""
    torch.set_num_threads(threads)
    libc = ctypes.CDLL(None)
    # Tensors in mappings of their own, given back when they are freed: otherwise glibc raises the bound as it goes, and what
    # its heaps keep differs from one machine to another by tens of MB.
    libc.mallopt(M_MMAP_THRESHOLD, 128 << 10)
    train(Run(**{**run.__dict__, "num_classes": 64, "dim": 8}))  # whatever libraries set up once
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = train_log.memory(torch.device("cpu"))
    train(run)
    return train_log.peak_memory(torch.device("cpu")) - before


def train(run: Run) -> None:
    head = ShardedAMSoftmaxLoss(
        run.dim, run.num_classes, save_bytes=run.save_bytes, sample_rate=run.sample_rate,
        sampling_correction=run.sampling_correction, seed=0, subcentres=run.subcentres,
    )  # fmt: skip
    decay = 1e-4 if run.weight_decay else 0.0
    optimizer: torch.optim.Optimizer
    if run.optimizer == "adamw":
        optimizer = torch.optim.AdamW(head.parameters(), weight_decay=decay)
    elif run.optimizer == "fused-adamw":
        optimizer = FusedAdamW(head, weight_decay=decay)
    elif run.optimizer == "fused-sgd":
        optimizer = FusedSGD(head, lr=0.1, momentum=0.9, weight_decay=decay)
    else:
        momentum = 0.9 if run.optimizer == "momentum" else 0.0
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=momentum, weight_decay=decay)
    for _ in range(2):
        features = torch.randn(run.batch, run.dim, requires_grad=True)
        optimizer.zero_grad()
        head(features, torch.randint(run.num_classes, (run.batch,))).backward()
        optimizer.step()


def test_memory_by_hand_on_an_h200() -> None:
    run = Run(1_000_000, 512, 128, 8, compute_dtype=torch.bfloat16, device="cuda")
    needed = memory(run)
    shard = 125_000 * 512 * 4
    assert needed.held == {"centres": shard, "optimizer state (momentum)": shard}
    assert needed.backward["gradient"] == shard and needed.backward["kept terms E"] == 2 * 1024 * 125_008
    assert needed.update["gradient"] == shard and sum(needed.update.values()) == shard
    assert needed.total == 2 * shard + sum(needed.backward.values())
    assert sum(needed.backward.values()) < shard + 2 * 1024 * 125_008 + 60e6  # the rest is small
    none = memory(Run(1_000_000, 512, 128, 8, compute_dtype=torch.bfloat16, device="cuda", save_bytes=0))
    assert none.backward["kept terms E"] == 0
    assert none.backward["E and ŵ of a chunk"] == 2 * 125_008 * (1024 + 512) and "E and ŵ of a chunk" not in needed.backward
    assert Memory({"a": 1}, {"b": 5}, {"c": 7}).total == 8


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that have been made and are alive, and their peak."""

    def __init__(self, *there_before: torch.Tensor) -> None:
        super().__init__()
        self.bytes, self.peak = 0, 0
        self._known = {each.untyped_storage()._cdata for each in there_before}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in self._known:
                storage = each.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self._known.add(key)
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._freed, key, size)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"save_bytes": 0},
        {"save_bytes": 2 * 256 * 4096},
        {"dim": 100},
        {"dim": 100, "dtype": torch.bfloat16, "save_bytes": 0},
        {"compute_dtype": torch.float32, "dtype": torch.bfloat16},
        {"optimizer": "fused-sgd"},
        {"optimizer": "fused-sgd", "dim": 100, "dtype": torch.bfloat16},
        {"subcentres": 3, "save_bytes": 0},
        {"subcentres": 3, "optimizer": "fused-sgd"},
    ],
    ids=str,
)
def test_memory_on_a_gpu_is_what_the_kernels_are_given(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers of a backward pass, with kernels that do nothing in the place of a GPU's."""
    pytest.importorskip("triton")
    from amsoftmax_kernels.backends import Needs, Problem, Request, Upstream, chunking, fused
    from amsoftmax_kernels.backends import triton as backend
    from amsoftmax_kernels.backends.update import SGD
    from bench.kernels.launches import Updated, no_product, recording

    monkeypatch.setattr(chunking, "CHUNK_ELEMENTS", 1 << 19)
    monkeypatch.setattr(chunking, "FINISH_ELEMENTS", 1 << 17)
    monkeypatch.setattr(fused, "_product", no_product)
    given: dict[str, Any] = {"dim": 128, "compute_dtype": torch.bfloat16, "save_bytes": 1 << 40, **options}
    run = Run(20_000, batch=256, ranks=1, device="cuda", **given)
    features, weight = torch.empty(run.rows, run.dim), torch.empty(run.classes, run.dim, dtype=run.dtype)
    labels, vector = torch.zeros(run.rows, dtype=torch.int64), torch.zeros(run.rows)
    problem = Problem(features, weight, labels, None, 30.0, True, run.compute_dtype, math.inf,
                      run.subcentres)  # fmt: skip
    updated = Updated(SGD(0.1, 0.9, 0.0, 0.0, False, False), run.dtype).of(weight) if run.fused else None
    there = (features, weight, labels, vector, *(updated.state if updated is not None else ()))
    with recording((9, 0), 132), Allocated(*there) as allocated:
        saved = backend.forward(problem, Request(run.save_bytes, False, True))
        allocated.peak = allocated.bytes
        backend.backward(problem, saved, Upstream(vector, vector, None), Needs(True, True, False), updated)
    backward = memory(run).backward
    gathered = run.rows * chunking.padded(run.dim) * (run.compute_dtype.itemsize + 4)  # there before: the batch itself
    assert allocated.peak == pytest.approx(sum(backward.values()) - gathered, rel=0.05)


def test_centres_updated_in_the_backward_pass_have_no_gradient_of_their_size() -> None:
    """29 million identities of 512 numbers in float32, with momentum, fit one H200."""
    run = Run(29_000_000, 512, 1024, 1, "fused-sgd", compute_dtype=torch.bfloat16, device="cuda")
    whole = 29_000_000 * 512 * 4
    assert 2 * whole < memory(run).total < 2 * whole + 3e9 < 141e9
    assert memory(Run(29_000_000, 512, 1024, 1, compute_dtype=torch.bfloat16, device="cuda")).total > 141e9
    # Of a weight 12 bytes less: the gradient is neither written nor read, and the centres are not read again.
    dense = Run(1_000_000, 512, 1024, 1, "momentum", compute_dtype=torch.bfloat16, device="cuda")
    fused = Run(**{**dense.__dict__, "optimizer": "fused-sgd"})
    rates = plan_time.of_gpu("h200")
    seconds = [plan_time.step(each, rates, 4e11) for each in (dense, fused)]
    saved = (seconds[0]["step_s"] - seconds[1]["step_s"]) * rates.copy / (1_000_000 * 512)
    assert saved == pytest.approx(12)


def test_the_smallest_number_of_ranks() -> None:
    run = Run(10_000_000, 512, 64, 1, save_bytes=0)
    limit = 10**10
    ranks = smallest_ranks(run, limit)
    assert ranks is not None and 6 <= ranks <= 8  # 61.4 GB of centres, momentum and gradient
    totals = [memory(Run(10_000_000, 512, 64, each, save_bytes=0)).total for each in (ranks - 1, ranks)]
    assert totals[0] > limit >= totals[1]
    assert smallest_ranks(run, 10**6, most=100) is None


def test_bytes_on_the_wire() -> None:
    wire = plan_time.wire_bytes(Run(1000, 64, 32, 4, compute_dtype=torch.bfloat16))
    assert wire["all-gather of features and labels"] == 3 * 32 * (64 * 2 + 8)
    assert wire["all-reduce of z and t"] == 2 * 3 * 8 * 128 // 4
    assert wire["reduce-scatter of the features' gradient"] == 3 * 128 * 64 * 4 // 4
    assert wire["sizes of the batches"] == 3 * 16
    assert not any(plan_time.wire_bytes(Run(1000, 64, 32, 1)).values())


def test_time_of_a_card_and_of_a_cpu() -> None:
    run = Run(8_000_000, 512, 128, 8, compute_dtype=torch.bfloat16, device="cuda", save_bytes=1 << 40)
    rates = plan_time.of_gpu("h200")
    times = plan_time.step(run, rates, 4e11)
    floor = 6 * 1024 * 1_000_000 * 512 / 790e12 + 12 * 1_000_000 * 512 / 4.3e12
    assert times["floor_s"] == pytest.approx(floor) and 0.5 < floor / times["head_s"] < 1
    assert times["update_s"] == pytest.approx(20 * 1_000_000 * 512 / 4.3e12)
    assert times["step_s"] == pytest.approx(times["head_s"] + times["update_s"] + times["wire_s"])
    recomputed = plan_time.step(Run(**{**run.__dict__, "save_bytes": 0}), rates, 4e11)
    assert recomputed["head_s"] > 1.2 * times["head_s"]
    sampled = plan_time.step(Run(**{**run.__dict__, "sample_rate": 0.1}), rates, 4e11)
    assert 0.09 < sampled["head_s"] / times["head_s"] < 0.12

    for kind, slower in (("float16", 1.01), ("float32", 8)):
        dtype = Run(**{**run.__dict__, "compute_dtype": getattr(torch, kind)})
        other = plan_time.step(dtype, plan_time.of_gpu("h200", kind), 4e11)
        assert other["head_s"] > slower * times["head_s"]
        given = plan_time.step(dtype, plan_time.of_another_card(1e12, 4.3e12), 4e11)
        assert given["floor_s"] == pytest.approx(6 * 1024 * 1_000_000 * 512 / 1e12, rel=0.01)

    recorded = ({"peer": "ours", "B": 256, "D": 512, "C": 10_000, "of_floor": 2.0},
                {"peer": "ours", "B": 256, "D": 512, "C": 900_000, "of_floor": 1.5})  # fmt: skip
    cpu = plan_time.Rates(1e11, 1e10, "", recorded=recorded)
    times = plan_time.step(Run(1_000_000, 512, 256, 1), cpu, 1e9)
    assert times["head_s"] == pytest.approx(1.5 * 6 * 256 * 512 * 1_000_000 / 1e11)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--classes", "10000", "1000000000", "--ranks", "8", "64", "--json", str(tmp_path / "plan.json")]
    assert main(["plan", *arguments]) == 1, "one does not fit"
    printed = capsys.readouterr().out
    assert printed.startswith("ESTIMATE, head only") and "assumed" in printed
    plans = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert [(each["classes"], each["ranks"]) for each in plans] == [(C, W) for C in (10_000, 10**9) for W in (8, 64)]
    assert [each["fits"] for each in plans] == [True, True, False, True]
    assert printed.count(" NO ") == 1 and plans[2]["smallest_ranks"] == plans[3]["smallest_ranks"] <= 64
    assert main(["plan", "--classes", "1000", "--ranks", "2"]) == 0
    assert "in the optimizer's step" in capsys.readouterr().out
    assert main(["plan", "--classes", "1000", "--ranks", "1", "--optimizer", "sgd"]) == 0
    printed = capsys.readouterr().out
    assert "wire" not in printed and "link" not in printed and "optimizer state" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", "0"), "--ranks must be at least 1"),
        (("--memory-gb", "80"), "together; or name one"),
        (("--tflops", "100", "--copy-gb-per-s", "1000"), "together; or name one"),
        (("--gpu", "a100", "--tflops", "100"), "does not name"),
        (("--device", "cpu", "--gpu", "a100"), "are for --device cuda"),
    ],
)
def test_arguments_that_do_not_go_together(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2 and message in capsys.readouterr().err


def test_each_card_has_its_own_memory_and_speed(tmp_path: Path) -> None:
    found = {}
    another = ("--memory-gb", "48", "--tflops", "150", "--copy-gb-per-s", "800")
    for name in ("h200", "h100", "a100", "another"):
        given = another if name == "another" else ("--gpu", name)
        arguments = ["plan", "--classes", "1000000", "--ranks", "8", *given, "--json", str(tmp_path / name)]
        assert main(arguments) == 0
        (found[name],) = json.loads((tmp_path / name).read_text())["plans"]
    assert [plan["memory_limit"] / 1e9 for plan in found.values()] == [141, 80, 80, 48]
    steps = [plan["time"]["step_s"] for plan in found.values()]
    assert steps == sorted(set(steps))
    # An A100 has no kernel that makes the centres' gradient at once, and no Hopper's float32 rate.
    assert found["a100"]["time"]["head_s"] > 790 / 250 * 0.9 * found["h200"]["time"]["head_s"]
    assert plan_time.of_gpu("a100", "float32").products == pytest.approx(0.8 * 19.5e12, rel=0.01)


def test_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plan_time.measure, "product_rates", lambda *_: {"any": 1e11})
    assert main(["plan", "--classes", "5000", "--ranks", "1", "--device", "cpu", "--memory-gb", "1"]) == 0
    printed = capsys.readouterr().out
    recorded = {path.name: json.loads(path.read_text())["dtype"] for path in plan_time.RESULTS.glob("loss-*.json")}
    assert "float32" in recorded.values()
    for name, dtype in recorded.items():
        assert (name in printed) == (dtype == "float32" and "quick" not in name)
    assert "measured now" in printed and "0.1 TFLOP/s" in printed
