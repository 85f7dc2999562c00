"""What has become of a process, as Linux has it."""

from __future__ import annotations

import time
from pathlib import Path


def state(process: int) -> str:
    """R, S, T (stopped), Z (ended, and not waited for)."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def ended(process: int) -> bool:
    """Whether a process that has been killed is gone, which it may take a moment for."""
    for _ in range(1000):
        try:
            if state(process) == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False
