"""Errors come before any work, name the argument, what it was and what it must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import amsoftmax_kernels as ak
from amsoftmax_kernels.margins import AdditiveMargin, AnnealedAdditiveMargin

GOOD: dict[str, Any] = {"features": torch.randn(4, 8), "weight": torch.randn(10, 8), "labels": torch.tensor([0, 1, 9, 5])}
NAN = float("nan")

BAD = [
    ("features", [[1.0]], TypeError, "list"),
    ("features", torch.ones(4, 8, dtype=torch.int64), TypeError, "int64"),
    ("features", torch.ones(4, 8, dtype=torch.complex64), TypeError, "complex64"),
    ("features", torch.randn(4, 8).to_sparse(), TypeError, "sparse"),
    ("features", torch.randn(4), ValueError, r"\[4\]"),
    ("features", torch.randn(4, 7), ValueError, "7 and 8$"),
    ("features", torch.randn(4, 10), ValueError, r"10 and 8: if features are logits \[B, C\], give the embeddings"),
    ("weight", None, TypeError, "NoneType"),
    ("weight", torch.ones(10, 8, dtype=torch.bool), TypeError, "bool"),
    ("weight", torch.randn(0, 8), ValueError, r"\[0, 8\]"),
    ("weight", torch.randn(10, 8, 1), ValueError, r"\[10, 8, 1\]"),
    ("weight", torch.randn(10, 8, device="meta"), ValueError, "meta"),
    ("labels", [0, 1, 9, 5], TypeError, "list"),
    ("labels", torch.tensor([0.0, 1, 9, 5]), TypeError, "float32"),
    ("labels", torch.tensor([True, False, True, True]), TypeError, "bool"),
    ("labels", torch.tensor([0, 1, 9]), ValueError, r"\[3\]"),
    ("labels", torch.tensor([[0, 1, 9, 5]]), ValueError, r"\[1, 4\]: give labels\.view\(-1\)"),
    ("labels", torch.eye(10, dtype=torch.int64)[:4], ValueError, r"\[4, 10\]: if it is one-hot, give labels\.argmax\(1\)"),
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
    ("margin", 28.6, ValueError, "28.6: if that is an angle in degrees, give what is taken off the cosine"),
    ("margin", torch.ones(9), ValueError, r"\[9\]"),
    ("margin", torch.ones(10, dtype=torch.int64), TypeError, "int64"),
    ("margin", torch.ones(10, device="meta"), ValueError, "meta"),
    ("margin", lambda t, labels, norm: t.sum(), ValueError, r"\[\]"),
    ("margin", lambda t, labels, norm: 0.3, ValueError, "float"),
    ("margin", torch.full((10,), 28.6), ValueError, "28.6.*degrees"),
    ("margin", torch.tensor([0.3] * 9 + [NAN]), ValueError, "nan"),
    ("margin", AdditiveMargin(torch.zeros(12)), ValueError, r"\[12\]"),
    ("normalize_features", 1, TypeError, "int"),
    ("reduction", None, TypeError, "NoneType"),
    ("reduction", "average", ValueError, "'average'"),
    ("ignore_index", -1.0, TypeError, "float"),
    ("ignore_index", 2**70, ValueError, str(2**70)),
    ("backend", 3, TypeError, "int"),
    ("backend", [1], TypeError, "list"),
    ("backend", "tensorflow", ValueError, "'tensorflow'"),
    ("backend", "cuda", ValueError, "cannot run here"),
    ("save_bytes", 1.5, TypeError, "float"),
    ("save_bytes", float("inf"), TypeError, "float"),
    ("save_bytes", NAN, TypeError, "float"),
    ("save_bytes", -1e9, ValueError, "-1000000000"),
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


def test_bytes_may_be_a_whole_float() -> None:
    features = GOOD["features"].clone().requires_grad_()
    assert torch.equal(call(**{**GOOD, "features": features}, save_bytes=1e9), call(**GOOD))
    for head in (ak.AMSoftmaxLoss(8, 10, save_bytes=1e9), ak.ShardedAMSoftmaxLoss(8, 10, save_bytes=1e9)):  # type: ignore[arg-type]
        assert type(head.save_bytes) is int and head.save_bytes == 10**9


def test_every_head_says_what_to_do_with_labels_of_two_dimensions() -> None:
    features, weight, labels = GOOD.values()
    sampled = ak.ShardedAMSoftmaxLoss(8, 10, sample_rate=0.5)
    for head in (ak.AMSoftmaxLoss(8, 10), ak.ShardedAMSoftmaxLoss(8, 10), sampled):
        with pytest.raises(ValueError, match=r"labels must .*labels\.view\(-1\)"):
            head(features, labels[None])
    with pytest.raises(ValueError, match=r"labels must .*labels\.view\(-1\)"):
        ak.AMSoftmaxFunction.apply(features, weight, labels[None])


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


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_numbers_of_numpy_are_numbers(backend: str) -> None:
    numpy = pytest.importorskip("numpy")
    given = {"scale": numpy.float32(20), "margin": numpy.float32(0.25), "ignore_index": numpy.int64(-7)}
    more: dict[str, Any] = {"interclass_filter": numpy.float64(0.5)}
    expected = call(**GOOD, scale=20.0, margin=0.25, ignore_index=-7, interclass_filter=0.5, backend=backend)
    assert call(**GOOD, **given, **more, save_bytes=numpy.int32(0), backend=backend) == expected
    head = ak.AMSoftmaxLoss(numpy.int64(8), numpy.int32(10), **given, **more)
    assert (head.embedding_dim, head.num_classes, head.scale, head.margin) == (8, 10, 20.0, 0.25)
    assert AdditiveMargin(numpy.float16(0.5)).margin == 0.5 and AnnealedAdditiveMargin(end=numpy.float32(0.25)).end == 0.25
    assert ak.ShardedAMSoftmaxLoss(8, 10, sample_rate=numpy.float32(0.5), seed=numpy.int64(3)).sample_rate == 0.5
    with pytest.raises(TypeError, match="scale must be a float or a 0-d tensor, but it is bool"):
        call(**{**GOOD, "scale": numpy.bool_(True)})


@pytest.mark.parametrize("value", [1, "yes", None, torch.tensor([1, 0])], ids=["int", "str", "None", "Tensor"])
def test_return_predictions_is_a_flag(value: Any) -> None:
    shown = repr(value) if isinstance(value, str) else type(value).__name__
    match = f"return_predictions must be a bool or 'with_margin', but it is {shown}"
    for backend in ("chunked", "reference"):
        with pytest.raises(TypeError, match=match):
            call(**GOOD, backend=backend, return_predictions=value)
    sampled = ak.ShardedAMSoftmaxLoss(8, 10, sample_rate=0.5)
    for head in (ak.AMSoftmaxLoss(8, 10), sampled):
        with pytest.raises(TypeError, match=match):
            head(GOOD["features"], GOOD["labels"], value)


def test_a_margin_object_is_checked_when_it_is_made() -> None:
    for value, error, said in (
        ("a", TypeError, "str"),
        (NAN, ValueError, "nan"),
        (28.6, ValueError, "28.6"),
        (torch.tensor([0.3, 28.6]), ValueError, "28.6"),
        (torch.tensor([0.3, NAN]), ValueError, "nan"),
        (torch.tensor(1), TypeError, "int64"),
        (torch.nn.Parameter(torch.tensor(28.0)), ValueError, "28.0"),
    ):
        with pytest.raises(error, match=f"margin .*{said}"):
            AdditiveMargin(value)
    assert isinstance(AdditiveMargin(torch.empty(3, device="meta")).margin, torch.Tensor)
    for name, value, error in (
        ("start", "0", TypeError),
        ("end", 28.6, ValueError),
        ("start", -28.6, ValueError),
        ("end", torch.tensor(0.3), TypeError),
        ("increment", None, TypeError),
        ("increment", float("inf"), ValueError),
    ):
        with pytest.raises(error, match=f"{name} "):
            AnnealedAdditiveMargin(**{name: value})
    for margin in (torch.full((10,), 28.6), torch.tensor([NAN] * 10)):
        with pytest.raises(ValueError, match=r"margin is taken off a cosine and must lie in \[-2, 2\]"):
            ak.AMSoftmaxLoss(8, 10, margin=margin)


def test_a_learned_margin_may_go_where_it_goes() -> None:
    margin = AdditiveMargin(torch.nn.Parameter(torch.tensor(0.3)))
    margin.margin.data.fill_(2.5)  # type: ignore[union-attr]
    assert call(**GOOD, margin=margin).isfinite()


def test_margins_are_read_only_where_they_have_values() -> None:
    """Not under torch.func's transforms, nor in fake tensors."""
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.func.grad(lambda x: ak.am_softmax_loss(x, *list(GOOD.values())[1:]))(GOOD["features"])
    margins = torch.tensor([0.1, 0.3])
    losses = torch.func.vmap(lambda m: ak.reference.am_softmax_loss(*GOOD.values(), margin=m))(margins)
    for loss, margin in zip(losses, margins, strict=True):
        assert torch.allclose(loss, ak.reference.am_softmax_loss(*GOOD.values(), margin=margin.item()))
    with torch._subclasses.FakeTensorMode():
        assert ak.AMSoftmaxLoss(8, 10, margin=torch.full((10,), 0.3)).weight.shape == (10, 8)


def test_a_number_of_numpy_can_be_compiled() -> None:
    numpy = pytest.importorskip("numpy")
    head = ak.AMSoftmaxLoss(8, 10, scale=numpy.float64(20), margin=numpy.float64(0.25))
    assert type(head.scale) is float and type(head.margin) is float
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(GOOD["features"], GOOD["labels"]), head(GOOD["features"], GOOD["labels"]))
