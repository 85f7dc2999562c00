"""Options and parameters of `pytest bench --benchmark-only`, and the picture that it draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from . import machine
from .loss import picture
from .test_steps import libraries

SHAPES = [(64, 128, 1_000), *((256, 512, C) for C in (1_000, 10_000, 100_000, 1_000_000)), (512, 512, 1_000_000)]
DTYPES = ("float32", "bfloat16")  # of the computation; bfloat16 by autocast


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--shape", type=int, nargs=3, action="append", metavar=("B", "D", "C"), help="to be timed")
    group.addoption("--picture", type=Path, metavar="FILE", help="time and memory against classes, float32")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "library" not in metafunc.fixturenames:
        return
    shapes = [tuple(each) for each in metafunc.config.getoption("shape") or SHAPES]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    pairs = [(device, library) for device in devices for library in libraries(device)]
    metafunc.parametrize(("device", "library"), pairs)
    metafunc.parametrize("dtype", DTYPES)
    metafunc.parametrize("shape", shapes, ids=["B{}-D{}-C{}".format(*shape) for shape in shapes])


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    device = torch.device("cuda") if torch.cuda.is_available() else None
    machine_info |= {"bench": machine.describe(device)}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    path = config.getoption("picture")
    found = [{**each["extra_info"], "median_s": each["stats"]["median"]} for each in output_json["benchmarks"]]
    rows = [
        {**each, "peer": each["library"], "mm_floor_s": each["floor_s"]}
        for each in found
        if each["dtype"] == "float32" and each["device"] == found[0]["device"]
    ]
    if path is not None and rows:
        facts = output_json["machine_info"]["bench"]
        picture.draw(path, rows, f"float32\n{facts.get('gpu', facts['cpu'])}, torch {facts['torch']}")
