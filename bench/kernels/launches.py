"""What the Triton backend launches, without a GPU: its own host code run on the CPU with kernels that only take notes."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from amsoftmax_kernels.backends import Needs, Problem, Request, Upstream, chunking, fused, update
from amsoftmax_kernels.backends import triton as backend
from amsoftmax_kernels.backends.triton import backward_kernels, forward_kernels, tiles, update_kernels

NAMES = (
    "prepare_rows", "prepare_centres", "cosine_exp", "reduce_sums", "reduce_best", "reduce_shift", "additive_margin",
    "factor_rows", "grad_centres", "finish_centres", "finish_rows", "update_centres",
)  # fmt: skip
_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip


def module_of(name: str) -> Any:
    """Where a kernel is."""
    return next(module for module in (forward_kernels, backward_kernels, update_kernels) if hasattr(module, name))


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
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and specialized):
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


def _scale_of(problem: Problem) -> float | Tensor:
    """A tensor stands for one on the device."""
    return problem.scale if problem.normalize_features and problem.scale is not None else _real_scale_of(problem)


@contextlib.contextmanager
def recording(capability: tuple[int, int], multiprocessors: int) -> Iterator[list[Launch]]:
    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for name in NAMES:
            stack.enter_context(mock.patch.object(module_of(name), name, _Recorder(name, launches)))
        how = mock.patch.object(backend, "_config", lambda _, dtype: tiles.config(capability, chunking.kind(dtype)))
        stack.enter_context(how)
        gradient = tiles.GRADIENT.get(capability[0])
        stack.enter_context(mock.patch.object(backend, "_gradient_config", lambda _: gradient))
        stack.enter_context(mock.patch.object(backend, "_multiprocessors", lambda _: multiprocessors))
        stack.enter_context(mock.patch.object(backend, "_interpreted", lambda: False))
        stack.enter_context(mock.patch.object(fused, "scale_of", _scale_of))
        yield launches


def no_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """In the place of a library's, which would take nearly all the time."""
    return out


class Updated(NamedTuple):
    """How :class:`amsoftmax_kernels.backends.update.Update` is made up."""

    rule: update.SGD | update.AdamW
    state_dtype: torch.dtype = torch.float32
    stochastic: bool = False
    drawn: bool = False  # the classes are a sample
    replicas: bool = False  # which add up their gradients

    def of(self, weight: Tensor) -> update.Update:
        states = 2 if isinstance(self.rule, update.AdamW) else 1 if self.rule.momentum else 0
        return update.Update(
            self.rule,
            weight,
            tuple(torch.zeros_like(weight, dtype=self.state_dtype) for _ in range(states)),
            rows=torch.arange(len(weight)) if self.drawn else None,
            seed=0 if self.stochastic else None,
            blocks=update.Blocks(weight.shape[0], weight.shape[1], lambda block: block) if self.replicas else None,
        )


@dataclass(frozen=True)
class Options:
    """What a step's kernels depend on, beside its sizes. The scale is None for a tensor on the device."""

    compute_dtype: torch.dtype = torch.bfloat16
    save_bytes: int = 1 << 40
    normalize: bool = True
    scale: float | None = 30.0
    interclass_filter: float = math.inf
    predict: bool = False
    features_dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    constant_margin: bool = True
    mean: bool = True  # of the rows' losses
    of_norm: bool = False  # a margin that depends on ‖x‖
    needs: tuple[bool, bool, bool] = (True, True, False)  # gradients of features, weight and scale
    updated: Updated | None = None  # how the centres are, in the place of a gradient
    subcentres: int = 1  # K; C counts the centres, and is a multiple of it


def of_a_step(
    capability: tuple[int, int], multiprocessors: int, B: int, D: int, C: int, **options: Any
) -> list[Launch]:  # fmt: skip
    """The kernels of a forward and a backward pass, in order; ``options``: those of :class:`Options`."""
    with recording(capability, multiprocessors) as launches:
        _step(B, D, C, Options(**options))
    return launches


def _step(B: int, D: int, C: int, how: Options) -> None:
    features, weight = torch.empty(B, D, dtype=how.features_dtype), torch.empty(C, D, dtype=how.weight_dtype)
    labels, needs = torch.zeros(B, dtype=torch.int64), Needs(*how.needs)
    scale, number = (torch.tensor(30.0), 0.0) if how.scale is None else (None, how.scale)
    problem = Problem(
        features, weight, labels, scale, number, how.normalize, how.compute_dtype, how.interclass_filter, how.subcentres
    )
    save_bytes = how.save_bytes if any(needs) else 0
    margin = 0.35 if how.constant_margin else None
    out = backend.forward(problem, Request(save_bytes, how.predict, needs.features or needs.scale, margin, how.mean))
    if any(needs):
        vectors = torch.zeros(3, B).unbind()  # rows of one tensor: no kernel may count on their addresses
        grad_norm = vectors[2] if how.of_norm or not how.normalize else None
        updated = how.updated.of(weight) if how.updated is not None else None
        backend.backward(problem, out, Upstream(vectors[0], vectors[1], grad_norm), needs, updated)


_HALF = (torch.bfloat16, torch.float16)
# Compute dtype and those of features and weight, as autocast or their own dtype makes them.
_DTYPES = [
    *((half, *pair) for half in _HALF for pair in itertools.product((torch.float32, half), repeat=2)),
    (torch.float32,) * 3,
]
_NEEDS = [(rows, weights, scale) for rows in (True, False) for weights in (True, False) for scale in (True, False)]


def _combinations() -> Iterator[tuple[Options, bool]]:
    """Of the options of :func:`amsoftmax_kernels.am_softmax_loss`, all that could make another kernel of one.

    And whether several chunks of classes could. The cosines' kernel asks for no margin and no gradient of the scale, the
    others neither for filter nor predictions.
    """
    for dtype, save, normalize, scale, limit, predict, needs, subcentres in itertools.product(
        (*_HALF, torch.float32), (1 << 40, 0), (True, False), (30.0, 100.0, None), (math.inf, 0.5), (False, True),
        ((True, True, False), (False, True, False), (False, False, False)), (1, 2),
    ):  # fmt: skip
        yield Options(dtype, save, normalize, scale, limit, predict, needs=needs, subcentres=subcentres), False
    for (dtype, *dtypes), save, normalize, scale, of_norm, needs in itertools.product(
        _DTYPES, (1 << 40, 0), (True, False), (30.0, None), (False, True), _NEEDS
    ):
        if scale is None or not needs[2]:  # a number has no gradient
            how = Options(dtype, save, normalize, scale, features_dtype=dtypes[0], weight_dtype=dtypes[1], needs=needs)
            yield replace(how, of_norm=of_norm, mean=not of_norm), True
            if needs[1]:
                yield replace(how, of_norm=of_norm, updated=Updated(_SGD)), True


_SGD = update.SGD(0.1, 0.9, 0.0, 5e-4, False, False)
_ADAMW = update.AdamW(1e-3, 0.9, 0.999, 1e-8, 1e-2, 1)
_RULES: list[update.SGD | update.AdamW] = [_SGD, _ADAMW, _SGD._replace(momentum=0.0), _SGD._replace(nesterov=True)]
_UPDATES = [
    Updated(rule, state, stochastic, drawn, replicas)
    for drawn, replicas, state, stochastic, rule in itertools.product(
        (False, True), (False, True), (torch.float32, torch.bfloat16), (False, True), _RULES
    )
]
_FEW_UPDATES = [
    Updated(_SGD),
    Updated(_ADAMW, torch.bfloat16, stochastic=True),
    Updated(_SGD._replace(momentum=0.0), drawn=True),
    Updated(_SGD._replace(nesterov=True), replicas=True),
]


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
            {"scale": 100.0, "interclass_filter": 0.5, "predict": True, "constant_margin": False},
            {"normalize": False, "save_bytes": 0, "mean": False},
        ]
        for tf32, _ in enumerate(precisions):
            for each in [] if tf32 else few:
                add(256, 512, 2048, Options(torch.bfloat16, **each))
            for each in few[::2] if quick else few:  # the plainest, and the one that needs the most registers
                add(256, 512, 2048, Options(torch.float32, **each))
            for half in _HALF:
                add(256, 512, 2048, Options(half, features_dtype=half, weight_dtype=half))
            add(256, 512, 2048, Options(scale=None, needs=(True, True, True)))  # a scale that learns
            for how, subcentres in itertools.product(few[:3], (3,) if quick else (2, 3, 4, 5, 8)):
                add(256, 512, 2040, Options(torch.float32 if tf32 else torch.bfloat16, subcentres=subcentres, **how))
            for updated in () if tf32 else _FEW_UPDATES if quick else _UPDATES:
                few_dtypes = (torch.bfloat16,) if updated.stochastic else (torch.float32, torch.bfloat16)
                for dtype in few_dtypes if quick else (torch.float32, *_HALF):
                    add(256, 512, 2048, Options(weight_dtype=dtype, updated=updated))
            if quick:
                continue
            for how, chunked in _combinations():
                if not tf32 or how.compute_dtype == torch.float32:
                    add(16, 512, 32, how)
                    if chunked:
                        with mock.patch.object(chunking, "CHUNK_ELEMENTS", 1):  # two chunks of 256 classes
                            add(16, 512, 272, how)
        if not quick:
            add(100, 200, 1000, Options())  # a dimension that fills no tile
            for D, centres in itertools.product((128, 256, 496), (torch.float32, *_HALF)):  # the gradient's other tiles
                add(256, D, 2048, Options(weight_dtype=centres))
    return list(found)
