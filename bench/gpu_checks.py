"""Right before fast: correctness of every backend at small and large shapes, determinism, graph capture, sanitizer."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels import backends
from amsoftmax_kernels.backends.cuda import build

from .measure import first_line
from .peers import problem

Row = dict[str, Any]
# (B, D, C, options): tiles' edges, the options, then what only a GPU's memory holds: C·D past 2^31, and 10 million classes.
SMALL: list[tuple[int, int, int, dict[str, Any]]] = [
    (7, 64, 1_000, {}),
    (129, 100, 257, {}),
    (300, 512, 1_000, {"scale": 64.0}),
    (256, 512, 10_516, {}),
    (256, 512, 10_516, {"scale": 200.0}),
    (256, 512, 10_516, {"normalize_features": False}),
    (256, 512, 10_516, {"interclass_filter": 0.1}),
    (1024, 256, 20_000, {"reduction": "sum"}),
]
LARGE: list[tuple[int, int, int, dict[str, Any]]] = [
    (64, 512, 4_300_000, {}),
    (64, 128, 10_000_000, {}),
    (4096, 64, 600_000, {}),  # B·C past 2^31: E, kept
]
# Relative errors allowed of the loss (of one below 1, its error) and of each gradient, against float64.
TOLERANCE = {"float32": (2e-6, 2e-5), "bfloat16": (2e-4, 8e-3), "float16": (2e-4, 8e-3)}
# Of compute-sanitizer, with the seconds that each may take. They find reads and writes outside of tensors; barriers that not
# all threads come to, or that are not set up; uses of shared memory that barriers leave in no order.
MEMORY, RACES = {"memcheck": 100}, {"synccheck": 60, "racecheck": 60}
TESTS = (
    "replay",
    "triton",
    "triton_gradient",
    "triton_beside",
    "triton_half",
    "parts",
    "cuda",
    "cuda_gradient",
    "loss",
)  # of the kernels
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Clock:
    """Until when a run may take; what it starts ends by then."""

    ends = float("inf")

    def left(self) -> float:
        return self.ends - time.perf_counter()


clock = _Clock()
left_out: dict[str, str] = {}  # what a backend is to do without, in children too


def compared_backends(device: torch.device) -> list[str]:
    """The backends to check on this device."""
    names = [name for name in ak.available_backends() if name != "reference"]
    return [name for name in names if any(_serves(name, device, dtype) for dtype in DTYPES.values())]


def correctness(device: torch.device, quick: bool, small: Any = SMALL, large: Any = LARGE) -> Iterator[Row]:
    """Loss and gradients of every backend, dtype and save_bytes against float64, one row each."""
    for B, D, C, options in [*small, *([] if quick else large)]:
        features, weight, labels = problem(B, D, C, device)
        with torch.no_grad():  # half of the rows near their centre, as late in training
            features[::2] += 3 * features[::2].norm(dim=1, keepdim=True) * torch.nn.functional.normalize(weight[labels[::2]])
        shape = {"B": B, "D": D, "C": C, **options}
        try:
            exact = _step(features.double(), weight.double(), labels, "chunked" if C > 100_000 else "reference", 0, options)
        except torch.OutOfMemoryError as error:
            yield {**shape, "ok": None, "skipped": first_line(error)}
            continue
        for name in compared_backends(device):
            for dtype in ("bfloat16",) if C > 100_000 else TOLERANCE:
                if not _serves(name, device, DTYPES[dtype]):
                    continue
                for save_bytes in (1 << 62, 0):
                    row = {"backend": name, **shape, "dtype": dtype, "kept": save_bytes > 0}
                    try:
                        with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32"):
                            results = _step(features, weight, labels, name, save_bytes, options)
                        yield row | _compared(results, exact, dtype, options)
                        del results
                    except torch.OutOfMemoryError as error:
                        yield row | {"ok": None, "skipped": first_line(error)}
                    except Exception as error:  # the others' rows are wanted all the same
                        yield row | {"ok": False, "error": first_line(error)}
        del features, weight, exact
        _release(device)


def _compared(results: tuple[Tensor, ...], exact: tuple[Tensor, ...], dtype: str, options: dict[str, Any]) -> Row:
    errors = [_relative(*pair) for pair in zip(results, exact, strict=True)]
    errors[0] *= min(1.0, abs(exact[0].item()))  # a small loss is the difference of large numbers
    # In a scale of 200 an error of the cosine is one of the exponent, multiplied; a filter may fall between two roundings.
    slack = max(1.0, options.get("scale", 30.0) / 64) * (5 if "interclass_filter" in options else 1)
    ok = all(error <= bound * slack for error, bound in zip(errors, TOLERANCE[dtype] + TOLERANCE[dtype][1:], strict=True))
    return {"loss_error": errors[0], "features_error": errors[1], "weight_error": errors[2], "ok": ok}


def determinism(
    device: torch.device, repeats: int, shapes: Any = ((256, 512, 10_516), (1024, 512, 93_431))
) -> Iterator[Row]:
    """The same inputs, many times: every bit of loss and gradients the same."""
    for B, D, C in shapes:
        features, weight, labels = problem(B, D, C, device)
        labels[: B // 4] = labels[0]  # many rows of one class
        for name in compared_backends(device):
            for save_bytes in (1 << 62, 0):
                with torch.autocast(device.type, torch.bfloat16, enabled=_serves(name, device, torch.bfloat16)):
                    first = _step(features, weight, labels, name, save_bytes, {})
                    same = True
                    for _ in range(repeats):
                        again = _step(features, weight, labels, name, save_bytes, {})
                        same &= all(map(torch.equal, first, again))
                yield {"backend": name, "B": B, "D": D, "C": C, "kept": save_bytes > 0, "repeats": repeats, "ok": same}
        _release(device)


# What a captured step may be given beside sizes; the scale and the margins on the device.
CAPTURED: tuple[tuple[int, int, int, dict[str, Any]], ...] = (
    (256, 512, 10_516, {}),
    (256, 512, 10_516, {"scale": 200.0, "interclass_filter": 0.2}),
    (256, 512, 10_516, {"normalize_features": False, "return_predictions": True}),
    (256, 512, 10_516, {"scale": "on the device", "margin": "one a class"}),
    (1024, 512, 93_431, {}),
)


def graph_capture(device: torch.device, captured_steps: Any = CAPTURED) -> Iterator[Row]:
    """A step captured in a CUDA graph and replayed: the same bits as launched one by one."""
    for B, D, C, options in captured_steps:
        features, weight, labels = problem(B, D, C, device)
        given = dict(options)
        if "margin" in given:
            given |= {"scale": torch.tensor(30.0, device=device), "margin": torch.linspace(0, 0.5, C, device=device)}
        for name in compared_backends(device):
            for save_bytes in (1 << 62, 0):
                row = {"backend": name, "B": B, "D": D, "C": C, "kept": save_bytes > 0, **options}
                try:
                    graph, captured, expected = _capture(features, weight, labels, name, save_bytes, given)
                    for each in captured:
                        each.fill_(float("nan"))
                    graph.replay()
                    row["ok"] = all(map(torch.equal, captured, expected))
                    row["replay_s"] = _replay_seconds(graph)
                except Exception as error:  # the others' rows are wanted all the same
                    row |= {"ok": False, "error": first_line(error)}
                yield row
        _release(device)


def sanitizer(device: torch.device, tools: dict[str, int]) -> Iterator[Row]:
    """compute-sanitizer over a few of the first stage's shapes, if it is installed: what these of its tools find."""
    nvcc = build.find_nvcc()
    folders = [os.environ.get("PATH", ""), *([os.path.dirname(nvcc)] if nvcc else [])]
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if tool is None:
        yield {"ok": None, "skipped": "compute-sanitizer is not installed"}
        return
    # Cached, a tensor's neighbours would be memory that may be read.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for checked, seconds in tools.items():
        for name in compared_backends(device):
            if name != "chunked":
                without = [left_out[name]] if name in left_out else []
                child = [sys.executable, "-m", "bench.gpu_smoke", str(device), name, *without, "--few"]
                command = [tool, "--tool", checked, "--error-exitcode", "9", *child]
                yield {"backend": name, "tool": checked} | run_child(command, seconds, environment)


def gpu_tests() -> Iterator[Row]:
    """The repository's own tests of the kernels, on this device; first those that only a GPU can run."""
    tests = [f"tests/test_{name}.py" for name in TESTS]
    for marked, seconds in (("gpu", 200), ("not gpu", 300)):
        yield {"marked": marked} | run_child(
            [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-m", marked, *tests], seconds
        )


def run_child(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> Row:
    """Whether a command ends well; killed with all it has started after ``seconds``, or nothing else could be timed."""
    start = time.perf_counter()
    seconds = min(seconds, max(clock.left(), 1.0))
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        output, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        return {"ok": None, "skipped": f"did not end in {seconds:g} s", "output": output[-1500:]}
    missing = "No module named pytest" in output
    took = time.perf_counter() - start
    return {"ok": None if missing else child.returncode == 0, "seconds": took, "output": output[-1500:]}


def _step(
    features: Tensor, weight: Tensor, labels: Tensor, backend: str, save_bytes: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    x, w = features.detach().requires_grad_(), weight.detach().requires_grad_()
    result = ak.am_softmax_loss(x, w, labels, backend=backend, save_bytes=save_bytes, **options)
    loss = result[0] if isinstance(result, tuple) else result
    return (loss.detach(), *torch.autograd.grad(loss, (x, w)))


def _capture(
    features: Tensor, weight: Tensor, labels: Tensor, name: str, save_bytes: int, options: dict[str, Any]
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], tuple[Tensor, ...]]:
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                expected = _step(features, weight, labels, name, save_bytes, options)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _step(features, weight, labels, name, save_bytes, options)
    return graph, captured, expected


def _replay_seconds(graph: torch.cuda.CUDAGraph, times: int = 50) -> float:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    first.record()
    for _ in range(times):
        graph.replay()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / times


def _relative(actual: Tensor, exact: Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖, a block at a time so that no float64 copy of a large gradient is made."""
    error = size = torch.zeros((), dtype=torch.float64, device=exact.device)
    for ours, theirs in zip(actual.reshape(-1).split(1 << 26), exact.reshape(-1).split(1 << 26), strict=True):
        error = error + (ours.double() - theirs).square().sum()
        size = size + theirs.square().sum()
    value = (error / size).sqrt().item() if size > 0 else error.sqrt().item()
    return float("inf") if value != value else value


def _serves(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    return backends.load(name).serves(device, dtype)


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
