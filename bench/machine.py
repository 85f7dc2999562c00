"""What a recorded figure must say of the machine it was measured on."""

from __future__ import annotations

import datetime
import os
import platform
from typing import Any

import torch


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """Processor, cores, threads, versions and date; the GPU too if ``device`` is one."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    if device is not None and device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    return facts


def cpu_name() -> str:
    """The processor's name as Linux gives it, else the architecture."""
    return _first_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def available_bytes(device: torch.device) -> int | None:
    """Memory of ``device`` that can be had, without swapping on a CPU; None where Linux does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    field = _first_field("/proc/meminfo", "MemAvailable")
    return int(field.split()[0]) << 10 if field else None


def _first_field(path: str, name: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)
    except OSError:
        return None
