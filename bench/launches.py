"""What the Triton backend launches, without a GPU: its own host code run on the CPU with kernels that only take notes."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from amsoftmax_kernels.backends import Problem, triton_configs, triton_gradients, triton_kernels
from amsoftmax_kernels.backends import triton as backend

NAMES = (
    "canonical_labels", "prepare_rows", "prepare_centres", "cosine_exp", "reduce_sums", "reduce_best",
    "constant_margin", "factor_rows", "grad_centres", "finish_centres", "finish_rows",
)  # fmt: skip
_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip


def module_of(name: str) -> Any:
    """Where a kernel is."""
    return triton_kernels if hasattr(triton_kernels, name) else triton_gradients


@dataclass(frozen=True)
class Launch:
    """One kernel as it is compiled: types, constants, what is known of its arguments, and how it is laid out."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible_by_16: tuple[str, ...]
    warps: int
    stages: int

    def constant(self, name: str) -> Any:
        return dict(self.constants).get(name)


class _Recorder:
    def __init__(self, name: str, launches: list[Launch]) -> None:
        function = getattr(module_of(name), name)
        if not isinstance(function, JITFunction):  # under TRITON_INTERPRET=1
            function = JITFunction(function.fn, **function.kwargs)
        self.name, self.function, self.launches = name, function, launches

    def __getitem__(self, grid: Any) -> Any:
        return self._record

    def _record(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **kwargs: Any) -> None:
        values = dict(zip(self.function.arg_names, args, strict=False)) | kwargs
        signature, constants, divisible = {}, {}, []
        for parameter in self.function.params:
            name, value = parameter.name, values[parameter.name]
            specialized = not parameter.do_not_specialize
            if parameter.is_constexpr or (isinstance(value, int) and value == 1 and specialized):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name] = "*" + _TYPES[value.dtype]
                if specialized and value.data_ptr() % 16 == 0:
                    divisible.append(name)
            elif isinstance(value, int):
                signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
                if specialized and value % 16 == 0:
                    divisible.append(name)
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        self.launches.append(
            Launch(
                self.name, tuple(signature.items()), tuple(constants.items()), tuple(divisible), num_warps, num_stages
            )
        )  # fmt: skip


@contextlib.contextmanager
def _recording(capability: tuple[int, int], multiprocessors: int) -> Iterator[list[Launch]]:
    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for name in NAMES:
            stack.enter_context(mock.patch.object(module_of(name), name, _Recorder(name, launches)))
        how = mock.patch.object(
            backend, "_config", lambda _, dtype: triton_configs.config(capability, triton_configs.kind(dtype))
        )
        stack.enter_context(how)
        gradient = triton_configs.GRADIENT.get(capability[0])
        stack.enter_context(mock.patch.object(backend, "_gradient_config", lambda _: gradient))
        stack.enter_context(mock.patch.object(backend, "_multiprocessors", lambda _: multiprocessors))
        yield launches


def of_a_step(
    capability: tuple[int, int],
    multiprocessors: int,
    B: int,
    D: int,
    C: int,
    compute_dtype: torch.dtype = torch.bfloat16,
    save_bytes: int = 1 << 40,
    normalize: bool = True,
    scale: float = 30.0,
    interclass_filter: float = math.inf,
    predict: bool = False,
    weight_dtype: torch.dtype = torch.float32,
    constant_margin: bool = True,
) -> list[Launch]:
    """The kernels of a forward and a backward pass, in order; for a margin that is no number those of a backend alone."""
    features, weight = torch.zeros(B, D), torch.zeros(C, D, dtype=weight_dtype)
    labels, count = torch.zeros(B, dtype=torch.int64), torch.tensor(B)
    upstream = torch.zeros(2)[1]  # as if part of something else: no kernel may count on its address
    problem = Problem(features, weight, labels, torch.tensor(scale), normalize, compute_dtype, interclass_filter)
    with _recording(capability, multiprocessors) as launches:
        backend.fused.labels(labels, C, -100)
        how = (problem, save_bytes, predict, True, True)
        if constant_margin:
            out, _, derivatives = backend.forward_loss(*how, count, 0.35, "mean", not normalize)
            backend.backward_loss(problem, out, derivatives, upstream, (True, True, False))
        else:
            out = backend.forward(*how)
            backend.backward(problem, out, out.z, out.z, None if normalize else out.z, (True, True, False))
    return launches


def variants(capability: tuple[int, int], multiprocessors: int, quick: bool = False) -> list[Launch]:
    """Every kernel in every configuration of the table: dtypes, kept and recomputed, each option. Without repeats."""
    options: list[dict[str, Any]] = [
        {},
        {"save_bytes": 0},
        {"scale": 100.0, "interclass_filter": 0.5, "predict": True},
        {"normalize": False, "save_bytes": 0},
        {"constant_margin": False, "save_bytes": 0},
    ]
    if not quick:
        options += [{"constant_margin": False, "normalize": False}]
        options += [{"predict": True}, {"scale": 100.0}, {"interclass_filter": 0.5}, {"weight_dtype": torch.bfloat16}]
    found: dict[Launch, None] = {}
    for dtype, each in itertools.product((torch.bfloat16, torch.float16, torch.float32), options):
        found |= dict.fromkeys(of_a_step(capability, multiprocessors, 256, 512, 2048, dtype, **each))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32
    try:
        for each in options:
            found |= dict.fromkeys(of_a_step(capability, multiprocessors, 256, 512, 2048, torch.float32, **each))
    finally:
        torch.set_float32_matmul_precision(precision)
    if not quick:  # a dimension that fills no tile
        found |= dict.fromkeys(of_a_step(capability, multiprocessors, 100, 200, 1000))
        for D in (128, 256, 496):  # the centres' gradient in one tile, narrow or wide, and in two, of which one is not full
            found |= dict.fromkeys(of_a_step(capability, multiprocessors, 256, D, 2048))
    return list(found)
