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

from amsoftmax_kernels.backends import Problem, chunking, fused
from amsoftmax_kernels.backends import triton as backend
from amsoftmax_kernels.backends.triton import backward as triton_gradients
from amsoftmax_kernels.backends.triton import forward as triton_kernels
from amsoftmax_kernels.backends.triton import tiles as triton_configs

NAMES = (
    "canonical_labels", "prepare_rows", "prepare_centres", "cosine_exp", "reduce_sums", "reduce_best",
    "constant_margin", "factor_rows", "grad_centres", "grad_both", "finish_centres", "finish_rows",
)  # fmt: skip
_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
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


_real_scale_of = fused.scale_of


def _scale_of(scale: Tensor, normalize: bool) -> float | Tensor:
    """A float32 scale stands for one on the device; a number comes as float64."""
    return scale if normalize and scale.dtype == torch.float32 else _real_scale_of(scale, normalize)


@contextlib.contextmanager
def recording(capability: tuple[int, int], multiprocessors: int) -> Iterator[list[Launch]]:
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
        stack.enter_context(mock.patch.object(backend, "_interpreted", lambda: False))
        stack.enter_context(mock.patch.object(fused, "scale_of", _scale_of))
        yield launches


def no_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """In the place of a library's, which would take nearly all the time."""
    return out


@dataclass(frozen=True)
class Options:
    """What a step's kernels depend on, beside its sizes. The scale is None for a tensor on the device.

    Any margin but a constant one takes a backend's ``forward`` and ``backward``, of which those kernels are alone recorded;
    ``of_norm``: it depends on ‖x‖.
    """

    compute_dtype: torch.dtype = torch.bfloat16
    save_bytes: int = 1 << 40
    normalize: bool = True
    scale: float | None = 30.0
    interclass_filter: float = math.inf
    predict: bool = False
    features_dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    labels_dtype: torch.dtype = torch.int64
    ignore_index: int = -100
    constant_margin: bool = True
    of_norm: bool = False
    reduction: str = "mean"
    needs: tuple[bool, bool, bool] = (True, True, False)  # gradients of features, weight and scale


def of_a_step(
    capability: tuple[int, int], multiprocessors: int, B: int, D: int, C: int, **options: Any
) -> list[Launch]:  # fmt: skip
    """The kernels of a forward and a backward pass, in order; ``options``: those of :class:`Options`."""
    with recording(capability, multiprocessors) as launches:
        _step(B, D, C, Options(**options))
    return launches


def _step(B: int, D: int, C: int, how: Options) -> None:
    features, weight = torch.empty(B, D, dtype=how.features_dtype), torch.empty(C, D, dtype=how.weight_dtype)
    labels = torch.zeros(B, dtype=how.labels_dtype)
    scale = torch.tensor(30.0) if how.scale is None else torch.tensor(how.scale, dtype=torch.float64)
    upstream = torch.zeros(2)[1]  # as if part of something else: no kernel may count on its address
    rows, weights, of_scale = how.needs
    problem = Problem(features, weight, labels, scale, how.normalize, how.compute_dtype, how.interclass_filter)
    asked = (problem, how.save_bytes if any(how.needs) else 0, how.predict, rows or of_scale, weights)
    if how.constant_margin:
        need_scale = of_scale or not how.normalize
        out = backend.forward_loss(*asked, how.ignore_index, 0.35, how.reduction, need_scale)
        if any(how.needs):
            upstream = upstream.expand(B) if how.reduction == "none" else upstream
            backend.backward_loss(problem._replace(labels=out.labels), out.saved, out.layout, upstream, how.needs)
    else:
        labels, _ = backend.fused.labels(labels, C, -100)
        problem = problem._replace(labels=labels)
        vectors = backend.forward(problem, *asked[1:])
        if any(how.needs):
            grad_norm = vectors.z if how.of_norm else None
            backend.backward(problem, vectors, vectors.z, vectors.z, grad_norm, how.needs)


_HALF = (torch.bfloat16, torch.float16)
# Compute dtype and those of features and weight, as autocast or their own dtype makes them.
_DTYPES = [
    *((half, *pair) for half in _HALF for pair in itertools.product((torch.float32, half), repeat=2)),
    (torch.float32,) * 3,
]
_NEEDS = [(rows, weights, scale) for rows in (True, False) for weights in (True, False) for scale in (True, False)]


def _combinations() -> Iterator[tuple[Options, bool]]:
    """Of the options of :func:`amsoftmax_kernels.am_softmax_loss`, all that could make another kernel of one.

    And whether several chunks of classes could. The cosines' kernel asks for no margin, reduction or gradient of the scale,
    the others neither for filter nor predictions; nothing is computed again but for the weight's gradient.
    """
    for dtype, save, normalize, scale, limit, predict, needs in itertools.product(
        (*_HALF, torch.float32), (1 << 40, 0), (True, False), (30.0, 100.0, None), (math.inf, 0.5), (False, True), _NEEDS
    ):
        if not needs[2] and (save or needs[1]):
            yield Options(dtype, save, normalize, scale, limit, predict, needs=needs), False
    margins = [(True, False, reduction) for reduction in ("mean", "sum", "none")]
    margins += [(False, of_norm, "mean") for of_norm in (False, True)]
    for (dtype, *dtypes), save, normalize, scale, margin, needs in itertools.product(
        _DTYPES, (1 << 40, 0), (True, False), (30.0, None), margins, _NEEDS
    ):
        if (scale is None or not needs[2]) and (save or needs[1]):  # a number has no gradient
            how = Options(
                dtype, save, normalize, scale, features_dtype=dtypes[0], weight_dtype=dtypes[1],
                constant_margin=margin[0], of_norm=margin[1], reduction=margin[2], needs=needs,
            )  # fmt: skip
            yield how, True


@contextlib.contextmanager
def _precisions() -> Iterator[Iterator[None]]:
    """Each way to multiply float32 in turn; the setting is left as it was."""
    before = torch.get_float32_matmul_precision()

    def each() -> Iterator[None]:
        for how in ("highest", "high"):
            torch.set_float32_matmul_precision(how)
            yield

    try:
        yield each()
    finally:
        torch.set_float32_matmul_precision(before)


def variants(capability: tuple[int, int], multiprocessors: int, quick: bool = False) -> list[Launch]:
    """The kernels in every configuration of the table, without repeats: all that contiguous tensors of D = 512 can launch.

    That is in float32 or the compute dtype. Other strides and addresses, which kernels are specialized for too, are left
    out; of other D there are samples. ``quick``: the most different only.
    """
    found: dict[Launch, None] = {}
    no_products = mock.patch.object(fused, "_product", no_product)
    with recording(capability, multiprocessors) as launches, _precisions() as precisions, no_products:

        def add(B: int, D: int, C: int, how: Options) -> None:
            _step(B, D, C, how)
            found.update(dict.fromkeys(launches))
            launches.clear()

        few: list[dict[str, Any]] = [
            {},
            {"save_bytes": 0},
            {"scale": 100.0, "interclass_filter": 0.5, "predict": True},
            {"normalize": False, "save_bytes": 0},
            {"constant_margin": False, "save_bytes": 0},
        ]
        for tf32, _ in enumerate(precisions):
            for dtype, each in itertools.product((torch.float32,) if tf32 else (*_HALF, torch.float32), few):
                add(256, 512, 2048, Options(dtype, **each))
            add(256, 512, 2048, Options(weight_dtype=torch.bfloat16))
            if quick:
                continue
            for how, chunked in _combinations():
                if not tf32 or how.compute_dtype == torch.float32:
                    add(16, 512, 32, how)
                    if chunked:
                        with mock.patch.object(chunking, "CHUNK_ELEMENTS", 1):  # two chunks of 256 classes
                            add(16, 512, 272, how)
        if not quick:
            for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
                backend.fused.labels(torch.zeros(256, dtype=dtype), 2048, -100)
                add(256, 512, 2048, Options(labels_dtype=dtype))
            backend.fused.labels(torch.zeros(256, dtype=torch.int64), 2048, 1 << 40)
            add(256, 512, 2048, Options(ignore_index=1 << 40))
            add(100, 200, 1000, Options())  # a dimension that fills no tile
            for D in (128, 256, 496):  # the centres' gradient in one tile, narrow or wide, and in two, one of them not full
                for C, centres in itertools.product((2048, 20_000), (torch.float32, *_HALF)):  # beside E·ŵ and alone
                    add(256, D, C, Options(weight_dtype=centres))
    return list(found)
