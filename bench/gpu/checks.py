"""Right before fast: correctness of every backend at small and large shapes, determinism, sanitizer, the tests."""

from __future__ import annotations

import contextlib
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

from ..loss.peers import problem
from ..measure import first_line

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
    (256, 512, 10_515, {"subcentres": 3}),  # classes by their centres
    (256, 512, 10_516, {"label_smoothing": 0.1}),
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
    "triton", "triton_compile", "triton_gradient", "triton_half", "cuda", "cuda_build", "cuda_gradient", "loss",
    "evaluation", "ready_margins",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Clock:
    """Until when a run may take; what it starts ends by then."""

    ends = float("inf")

    def left(self) -> float:
        return self.ends - time.perf_counter()


clock = _Clock()
_running: set[int] = set()  # children
left_out: dict[str, str] = {}  # the kernel that a backend is to do without, in children too
not_compiled: dict[str, str] = {}  # steps, as step_name() has them, that no stage is to launch, with the compiler's words


def step_name(backend: str, D: int, dtype: str, options: dict[str, Any] | None = None) -> str:
    """What decides which kernels a step launches."""
    return " ".join([backend, dtype, f"D={D}", *(f"{name}={value}" for name, value in (options or {}).items())])


def given(options: dict[str, Any], C: int, device: torch.device) -> dict[str, Any]:
    """Options as the loss takes them: a scale and margins that are described in words are tensors on the device."""
    tensors = {"on the device": lambda: torch.tensor(30.0, device=device),
               "one a class": lambda: torch.linspace(0, 0.5, C, device=device)}  # fmt: skip
    return {name: tensors[value]() if isinstance(value, str) and value in tensors else value
            for name, value in options.items()}  # fmt: skip


def compared_backends(device: torch.device) -> list[str]:
    """The backends to check on this device."""
    names = [name for name in ak.available_backends() if name != "reference"]
    return [name for name in names if any(serves(name, device, dtype) for dtype in DTYPES.values())]


def correctness(device: torch.device, quick: bool, small: Any = SMALL, large: Any = LARGE) -> Iterator[Row]:
    """Loss and gradients of every backend, dtype and save_bytes against float64, one row each."""
    for B, D, C, options in [*small, *([] if quick else large)]:
        features, weight, labels = problem(B, D, C, device)
        with torch.no_grad():  # half of the rows near their centre, as late in training
            features[::2] += 3 * features[::2].norm(dim=1, keepdim=True) * torch.nn.functional.normalize(weight[labels[::2]])
        labels %= C // options.get("subcentres", 1)
        shape = {"B": B, "D": D, "C": C, **options}
        try:
            exact = take_step(
                features.double(), weight.double(), labels, "chunked" if C > 100_000 else "reference", 0, options
            )
        except torch.OutOfMemoryError as error:
            yield {**shape, "ok": None, "skipped": first_line(error)}
            continue
        for name in compared_backends(device):
            for dtype in ("bfloat16",) if C > 100_000 else TOLERANCE:
                if not serves(name, device, DTYPES[dtype]):
                    continue
                if (refused := not_compiled.get(step_name(name, D, dtype, options))) is not None:
                    yield {"backend": name, **shape, "dtype": dtype, "ok": None, "skipped": f"does not compile: {refused}"}
                    continue
                for save_bytes in (1 << 62, 0):
                    row = {"backend": name, **shape, "dtype": dtype, "kept": save_bytes > 0}
                    try:
                        with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32"):
                            results = take_step(features, weight, labels, name, save_bytes, options)
                        yield row | _compared(results, exact, dtype, options)
                        del results
                    except torch.OutOfMemoryError as error:
                        yield row | {"ok": None, "skipped": first_line(error)}
                    except Exception as error:  # the others' rows are wanted all the same
                        yield row | {"ok": False, "error": first_line(error)}
        del features, weight, exact
        release(device)


def _compared(results: tuple[Tensor, ...], exact: tuple[Tensor, ...], dtype: str, options: dict[str, Any]) -> Row:
    errors = [relative_error(*pair) for pair in zip(results, exact, strict=True)]
    errors[0] *= min(1.0, abs(exact[0].item()))  # a small loss is the difference of large numbers
    # In a scale of 200 an error of the cosine is one of the exponent, multiplied; between two roundings may lie a filter, or
    # two centres of a class.
    slack = max(1.0, options.get("scale", 30.0) / 64) * (5 if {"interclass_filter", "subcentres"} & set(options) else 1)
    of_loss, of_gradients = TOLERANCE[dtype]
    bounds = (of_loss, *(max(of_gradients, 1e-3 if "subcentres" in options else 0),) * 2)
    ok = all(error <= bound * slack for error, bound in zip(errors, bounds, strict=True))
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
                with torch.autocast(device.type, torch.bfloat16, enabled=serves(name, device, torch.bfloat16)):
                    first = take_step(features, weight, labels, name, save_bytes, {})
                    same = True
                    for _ in range(repeats):
                        again = take_step(features, weight, labels, name, save_bytes, {})
                        same &= all(map(torch.equal, first, again))
                yield {"backend": name, "B": B, "D": D, "C": C, "kept": save_bytes > 0, "repeats": repeats, "ok": same}
        release(device)


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
                child = smoke_command(device, name, left_out.get(name), few=True)
                command = [tool, "--tool", checked, "--error-exitcode", "9", *child]
                yield {"backend": name, "tool": checked} | run_child(command, seconds, environment)


def smoke_command(device: torch.device, name: str, without: str | None, few: bool = False) -> list[str]:
    """A child that compares one backend with the chunked one (bench/gpu/smoke.py)."""
    refused = [each for each in not_compiled if each.startswith(f"{name} ")]
    command = [sys.executable, "-m", "bench.gpu.smoke", str(device), name, *([without] if without else [])]
    return [*command, *(["--few"] if few else []), *(["--not", *refused] if refused else [])]


def gpu_tests() -> Iterator[Row]:
    """The repository's own tests of the kernels, on this device; first those that only a GPU can run."""
    tests = [f"tests/test_{name}.py" for name in TESTS]
    for marked, seconds in (("gpu", 200), ("not gpu and not slow", 300)):
        yield {"marked": marked} | run_child(
            [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-m", marked, *tests], seconds
        )


def run_child(command: list[str], seconds: float, environment: dict[str, str] | None = None, output: int = 1500) -> Row:
    """Whether a command ends well; killed with all it has started after ``seconds``, or nothing else could be timed.

    ``output``: characters that are kept of the end of what it prints.
    """
    start = time.perf_counter()
    seconds = min(seconds, max(clock.left(), 1.0))
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    _running.add(child.pid)
    try:
        printed, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        printed, _ = child.communicate()
        return {"ok": None, "skipped": f"did not end in {seconds:g} s", "output": printed[-output:]}
    finally:
        _running.discard(child.pid)
    missing = "No module named pytest" in printed
    took = time.perf_counter() - start
    return {"ok": None if missing else child.returncode == 0, "seconds": took, "output": printed[-output:]}


def end_children() -> None:
    """Kill what still runs, with all that it has started."""
    for pid in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def take_step(
    features: Tensor, weight: Tensor, labels: Tensor, backend: str, save_bytes: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients by features and weight."""
    x, w = features.detach().requires_grad_(), weight.detach().requires_grad_()
    result = ak.am_softmax_loss(x, w, labels, backend=backend, save_bytes=save_bytes, **options)
    loss = result[0] if isinstance(result, tuple) else result
    return (loss.detach(), *torch.autograd.grad(loss, (x, w)))


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖, a block at a time so that no float64 copy of a large gradient is made."""
    error = size = torch.zeros((), dtype=torch.float64, device=exact.device)
    for ours, theirs in zip(actual.reshape(-1).split(1 << 26), exact.reshape(-1).split(1 << 26), strict=True):
        error = error + (ours.double() - theirs).square().sum()
        size = size + theirs.square().sum()
    value = (error / size).sqrt().item() if size > 0 else error.sqrt().item()
    return float("inf") if value != value else value


def serves(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend takes tensors of this device and dtype."""
    return backends.serves(name, device, dtype)


def release(device: torch.device) -> None:
    """Give cached memory back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
