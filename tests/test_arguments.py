"""Errors come before any work, name the argument, what it was and what it must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import amsoftmax_kernels as ak
from amsoftmax_kernels.margins import AdditiveMargin

GOOD: dict[str, Any] = {"features": torch.randn(4, 8), "weight": torch.randn(10, 8), "labels": torch.tensor([0, 1, 9, 5])}
NAN = float("nan")

BAD = [
    ("features", [[1.0]], TypeError, "list"),
    ("features", torch.ones(4, 8, dtype=torch.int64), TypeError, "int64"),
    ("features", torch.ones(4, 8, dtype=torch.complex64), TypeError, "complex64"),
    ("features", torch.randn(4, 8).to_sparse(), TypeError, "sparse"),
    ("features", torch.randn(4), ValueError, r"\[4\]"),
    ("features", torch.randn(4, 7), ValueError, "7"),
    ("weight", None, TypeError, "NoneType"),
    ("weight", torch.ones(10, 8, dtype=torch.bool), TypeError, "bool"),
    ("weight", torch.randn(0, 8), ValueError, r"\[0, 8\]"),
    ("weight", torch.randn(10, 8, 1), ValueError, r"\[10, 8, 1\]"),
    ("weight", torch.randn(10, 8, device="meta"), ValueError, "meta"),
    ("labels", [0, 1, 9, 5], TypeError, "list"),
    ("labels", torch.tensor([0.0, 1, 9, 5]), TypeError, "float32"),
    ("labels", torch.tensor([True, False, True, True]), TypeError, "bool"),
    ("labels", torch.tensor([0, 1, 9]), ValueError, r"\[3\]"),
    ("labels", torch.tensor([[0, 1, 9, 5]]), ValueError, r"\[1, 4\]"),
    ("labels", torch.tensor([0, 1, 10, 5]), ValueError, r"labels\[2\] is 10"),
    ("labels", torch.tensor([0, -1, 9, 5]), ValueError, r"labels\[1\] is -1"),
    ("labels", torch.tensor([0, 1, 9, 2**40]), ValueError, str(2**40)),
    ("scale", "30", TypeError, "str"),
    ("scale", True, TypeError, "bool"),
    ("scale", 0.0, ValueError, "0.0"),
    ("scale", -30.0, ValueError, "-30.0"),
    ("scale", NAN, ValueError, "nan"),
    ("scale", float("inf"), ValueError, "inf"),
    ("scale", torch.tensor([30.0]), ValueError, r"\[1\]"),
    ("scale", torch.tensor(30), TypeError, "int64"),
    ("scale", torch.tensor(-30.0), ValueError, "-30.0"),
    ("margin", "0.35", TypeError, "str"),
    ("margin", True, TypeError, "bool"),
    ("margin", NAN, ValueError, "nan"),
    ("margin", 28.6, ValueError, "28.6"),
    ("margin", torch.ones(9), ValueError, r"\[9\]"),
    ("margin", torch.ones(10, dtype=torch.int64), TypeError, "int64"),
    ("margin", torch.ones(10, device="meta"), ValueError, "meta"),
    ("margin", lambda t, labels, norm: t.sum(), ValueError, r"\[\]"),
    ("margin", lambda t, labels, norm: 0.3, ValueError, "float"),
    ("margin", AdditiveMargin(28.6), ValueError, "28.6"),
    ("margin", AdditiveMargin(torch.zeros(12)), ValueError, r"\[12\]"),
    ("normalize_features", 1, TypeError, "int"),
    ("reduction", None, TypeError, "NoneType"),
    ("reduction", "average", ValueError, "'average'"),
    ("ignore_index", -1.0, TypeError, "float"),
    ("ignore_index", 2**70, ValueError, str(2**70)),
    ("backend", 3, TypeError, "int"),
    ("backend", "tensorflow", ValueError, "'tensorflow'"),
    ("backend", "cuda", ValueError, "cannot run here"),
    ("save_bytes", 1.5, TypeError, "float"),
    ("save_bytes", -1, ValueError, "-1"),
]


def call(**arguments: Any) -> torch.Tensor:
    tensors = [arguments.pop(name) for name in ("features", "weight", "labels")]
    return ak.am_softmax_loss(*tensors, **arguments)


@pytest.mark.parametrize(("name", "value", "error", "said"), BAD, ids=[f"{row[0]}-{i}" for i, row in enumerate(BAD)])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_bad_arguments(name: str, value: Any, error: type[Exception], said: str, backend: str) -> None:
    with pytest.raises(error, match=f"{name}.*{said}"):
        call(**{**GOOD, "backend": backend, name: value})


def test_good_arguments() -> None:
    for margin in (0, -0.2, 0.5, torch.tensor(0.3), torch.full((10,), 0.3)):
        assert call(**GOOD, margin=margin, scale=30).isfinite()
    assert call(**GOOD, scale=torch.tensor(30.0), save_bytes=0).isfinite()


MODULE = [
    ("embedding_dim", 0, ValueError, "0"),
    ("embedding_dim", 8.0, TypeError, "float"),
    ("num_classes", -1, ValueError, "-1"),
    ("num_classes", True, TypeError, "bool"),
    *[row for row in BAD if row[0] in ("scale", "reduction", "ignore_index", "backend", "save_bytes", "normalize_features")],
]


@pytest.mark.parametrize(("name", "value", "error", "said"), MODULE, ids=[f"{row[0]}-{i}" for i, row in enumerate(MODULE)])
def test_bad_module_arguments(name: str, value: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=f"{name}.*{said}"):
        ak.AMSoftmaxLoss(**{"embedding_dim": 8, "num_classes": 10, name: value})


def test_reference_checks_too() -> None:
    with pytest.raises(ValueError, match=r"labels\[0\] is 12"):
        ak.reference.am_softmax_loss(GOOD["features"], GOOD["weight"], torch.full((4,), 12))
