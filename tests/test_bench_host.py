"""The host-time benchmark: that it runs the package's own host code, and launches nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ for the C++ library's host side")
def test_host_times() -> None:
    command = [sys.executable, "-m", "bench", "host", "--steps", "5", "--classes", "3000"]
    interpreted = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert interpreted.returncode == 1 and "unset TRITON_INTERPRET" in interpreted.stderr
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^(triton|cuda) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)$", result.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == ["triton", "cuda"]
    for _, forward, backward, step, anew, on_a_gpu, launches in rows:
        assert int(forward) > 10 and int(backward) > 10 and abs(int(forward) + int(backward) - int(step)) <= 2
        assert int(anew) > 20 and int(launches) == 5 and int(on_a_gpu) > int(step) + 19
