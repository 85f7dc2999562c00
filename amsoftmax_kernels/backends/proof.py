"""Before a backend on kernels serves a GPU for the first time, it proves itself there on a small problem.

The proof runs in a process of its own, as a kernel that hangs or reads where it may not takes its process along. Loss and
gradients are compared with those of ``chunked`` on the same device in float64. The verdict is kept on disk: a machine proves
each kind of call once for its driver, PyTorch, Triton and this package, and the kernels compiled on the way stay in Triton's
own cache. ``AMSOFTMAX_KERNELS_PROOF=0`` turns it off.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from . import Traits, chunking
from .comparison import compare
from .cuda import build

SWITCH = "AMSOFTMAX_KERNELS_PROOF"
SECONDS = 300.0  # for a proof; nearly all of them go to compiling
COMMAND = [sys.executable, "-m", "amsoftmax_kernels.backends.proof"]
READY = "amsoftmax_kernels: ready"  # printed by it before the backend is tried

_known: dict[tuple[Any, ...], str | None] = {}  # verdicts of this process
_here = threading.local()


def failure(name: str, traits: Traits) -> str | None:
    """Why this backend must not be given such tensors, in a line; None if it has proven itself on them.

    Raises:
        RuntimeError: a CUDA graph is being captured, and nothing can be proven meanwhile.
    """
    key = (name, traits, chunking.kind(traits.compute_dtype))
    if key in _known:
        return _known[key]
    if os.environ.get(SWITCH) == "0" or getattr(_here, "proving", False):
        return None
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"backend {name!r} is used for the first time on such tensors, inside a CUDA graph's capture: "
            "call the loss once before it, with tensors of the same dtypes and options"
        )
    _known[key] = _verdict(name, traits)
    return _known[key]


def _verdict(name: str, traits: Traits) -> str | None:
    """From the disk, or by a proof whose verdict is written there. The first of several processes proves."""
    facts = _facts(name, traits)
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    path = build.cache() / "proofs" / f"{digest}.json"
    with _lock(path):
        try:
            cause, kept = _cause(json.loads(path.read_text(encoding="utf-8"))["failure"]), True
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or not a verdict: it is made anew
            cause, lasting = _prove_apart(name, traits)
            kept = lasting and _write(path, {"failure": cause, **facts})
    return f"{cause} (kept in {path.parent}: delete it to try again)" if cause is not None and kept else cause


def _cause(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError
    return value


def _facts(name: str, traits: Traits) -> dict[str, Any]:
    """All that a verdict depends on, readable."""
    return {
        "backend": name,
        "card": describe(traits.device),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "package": _version("amsoftmax-kernels"),
        "sources": _sources(build.prebuilt_name() if name == "cuda" else ""),
        "without": os.environ.get(build.WITHOUT, "") if name == "cuda" else "",
        "traits": _encoded(traits) | {"device": traits.device.type},  # cards of one name share a verdict
    }


def describe(device: torch.device) -> str:
    """The card by name and compute capability."""
    if device.type != "cuda" or not torch.cuda.is_available():  # a fake tensor may be anywhere
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return ""


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _sources(library: str) -> str:
    """A digest of what the backends are made of."""
    digest = hashlib.sha256(library.encode())
    if library and Path(library).is_file():
        digest.update(str(build.written(Path(library))).encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; none at all where the folder cannot be written or the system has no such locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl  # not on Windows

            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path.with_suffix(".lock"), "w", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, verdict: dict[str, Any]) -> bool:
    with contextlib.suppress(OSError):  # then each process proves for itself
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(verdict, file, indent=1)
        os.replace(file.name, path)
        return True
    return False


def _prove_apart(name: str, traits: Traits) -> tuple[str | None, bool]:
    """The cause of a failure, and whether it would be the same the next time."""
    request = {"backend": name, "traits": _encoded(traits), "precision": chunking.kind(traits.compute_dtype)}
    paths = os.pathsep.join(os.path.abspath(each) for each in sys.path)  # and no other: not the working directory
    environment = os.environ | {SWITCH: "0", "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    try:
        child = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment, start_new_session=True,
        )  # fmt: skip
    except OSError as error:  # no process can be started here
        return _prove_here(name, traits, _line(f"{type(error).__name__}: {error}"))
    try:
        output, errors = child.communicate(json.dumps(request), timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"its proof did not end in {SECONDS:g} s", False
    finally:
        if child.returncode is None:  # late, or this process was interrupted
            _kill(child)
    try:
        answer = json.loads(output.splitlines()[-1])
        undecided = answer["undecided"]
        if undecided is None:
            return _cause(answer["failure"]), True
    except (ValueError, KeyError, IndexError, TypeError):
        code = child.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        undecided = _line(f"its proof ended with {how}: {_last(errors)}")
        if READY in output.splitlines():  # the backend's own fault, unless the system needed the memory
            return undecided, code != -signal.SIGKILL
    return _prove_here(name, traits, undecided)


def _kill(child: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)  # and the compilers that it started
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.communicate(timeout=10)  # a driver may hold it for longer


def _prove_here(name: str, traits: Traits, reason: str) -> tuple[str | None, bool]:
    """The proof in this process, where ``reason`` keeps another from it."""

    def prove() -> str | None:
        _here.proving = True
        return _tried(name, traits)

    # A thread has none of the caller's inference mode, autocast or default device.
    with ThreadPoolExecutor(1) as pool:
        try:
            cause = pool.submit(prove).result()
        except torch.OutOfMemoryError as error:
            cause = _line(f"OutOfMemoryError: {error}")
    return (None, True) if cause is None else (f"{cause} (in this process, as no other could try: {reason})", False)


def _tried(name: str, traits: Traits) -> str | None:
    try:
        return compare(name, traits)
    except torch.OutOfMemoryError:  # no fault of the backend's
        raise
    except Exception as error:  # of the compiler, the launcher or the driver
        return _line(f"{type(error).__name__}: {error}")


def _encoded(traits: Traits) -> dict[str, Any]:
    return {
        key: str(each) if isinstance(each, (torch.device, torch.dtype)) else each for key, each in traits._asdict().items()
    }


def _decoded(values: dict[str, Any]) -> Traits:
    read: dict[str, Any] = {
        key: getattr(torch, each.removeprefix("torch.")) if key.endswith("dtype") else each for key, each in values.items()
    }
    return Traits(**read | {"device": torch.device(values["device"])})


def _last(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it printed nothing")


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


def main() -> int:
    """The child: reads what to prove from its input, and prints the verdict as its last line."""
    request = json.load(sys.stdin)
    traits = _decoded(request["traits"])
    torch.set_float32_matmul_precision("high" if request["precision"] == "tf32" else "highest")
    answer: dict[str, Any] = {"undecided": None, "failure": None}
    try:
        torch.zeros(1, device=traits.device)
        print(READY, flush=True)
        answer["failure"] = _tried(request["backend"], traits)
    except Exception as error:  # another process has the device for itself, or all of its memory
        answer["undecided"] = _line(f"{type(error).__name__}: {error}")
    print("\n" + json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
