"""A backend's loss, gradients and predictions on a small problem, beside those of another in float64.

What a backend proves itself by on a GPU (:mod:`.proof`), and the self-test of ``python -m amsoftmax_kernels``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import Traits
from .chunking import kind

# Relative errors allowed of the loss and of each gradient; a gradient that is left out has one of 1. A cosine's rounding is
# multiplied by the scale: with bfloat16 operands gradients were off by 8e-3 at D = 16, scale 100.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "tf32": 6e-3, "half": 2e-2}
_NEAREST = 5e-3  # with sub-centres: where two of a class are within rounding, the other may be the nearest
# Rows and classes, past the edge of every tile; on a CPU kernels are emulated, which takes seconds.
SIZES, EMULATED_SIZES = (70, 1000), (24, 150)


def compare(name: str, traits: Traits, oracle: str = "chunked") -> str | None:
    """Loss, gradients and predictions of a backend beside those of another in float64; what is wrong, in a line.

    With E kept and recomputed, and for a scale that is not bounded both below the bound and past it.
    """
    tensors = _inputs(traits)
    scales: list[float | Tensor] = [30.0]
    if traits.normalize_features and not traits.bounded:
        scales += [100.0, torch.tensor(100.0, device=traits.device, requires_grad=True)]
    for scale in scales:
        exact = _step(oracle, [each.double() for each in tensors[:2]] + tensors[2:], scale, 0, traits)
        for save_bytes in (1 << 40, 0):
            found = _step(name, tensors, scale, save_bytes, traits)
            what = _difference(found, exact, traits, oracle)
            if what is not None:
                said = "100 on the device" if isinstance(scale, Tensor) else f"{scale:g}"
                return f"{what} (compute dtype {traits.compute_dtype}, scale {said}, save_bytes {save_bytes})"
    return None


def _inputs(traits: Traits) -> list[Tensor]:
    """Features, weight and labels: a third of the rows near their own centre, a third near a wrong one."""
    batch, centres = EMULATED_SIZES if traits.device.type == "cpu" else SIZES
    K = traits.subcentres
    num_classes = centres // K
    width = max(traits.width, 2)  # with one dimension a cosine is 1 or -1, and has no gradient
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(num_classes * K, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (batch,), generator=generator)
    labels[1], labels[2:6] = labels[0], -100
    near = torch.arange(batch) % 3
    for which, classes in ((1, labels.clamp(min=0)), (2, (labels + 1) % num_classes)):
        features[near == which] = weight[classes[near == which] * K] + 0.2 * features[near == which]
    features, weight = features.to(traits.features_dtype), weight.to(traits.weight_dtype)
    return [each.to(traits.device) for each in (features, weight, labels)]


def _step(name: str, tensors: list[Tensor], scale: float | Tensor, save_bytes: int, traits: Traits) -> dict[str, Tensor]:
    from ..functional import am_softmax_loss

    x, w = (each.detach().clone().requires_grad_() for each in tensors[:2])
    # Few dimensions leave no gap between the cosines; there the filter leaves out nothing.
    limit = (0.6 if traits.width >= 64 else 1.0) if traits.filtered else None
    cast = x.dtype != torch.float64 and traits.compute_dtype != torch.promote_types(x.dtype, w.dtype)
    with torch.autocast(x.device.type, traits.compute_dtype if cast else None, enabled=cast), torch.enable_grad():
        result: Any = am_softmax_loss(  # type: ignore[call-overload]
            x, w, tensors[2], scale=scale, normalize_features=traits.normalize_features, interclass_filter=limit,
            subcentres=traits.subcentres, return_predictions=traits.predict, backend=name,
            **({} if name == "reference" else {"save_bytes": save_bytes}),
        )  # fmt: skip
        loss, *predictions = result if traits.predict else (result,)
        learned = [scale] if isinstance(scale, Tensor) else []
        grads = torch.autograd.grad(loss, (x, w, *learned))
    names = ("loss", "gradient of features", "gradient of weight", "gradient of scale")
    named = dict(zip(names, (loss.detach(), *grads), strict=False))
    return named | ({"predictions": predictions[0]} if predictions else {})


def _difference(found: dict[str, Tensor], exact: dict[str, Tensor], traits: Traits, oracle: str) -> str | None:
    """What of a step is not as the other's."""
    tolerance = TOLERANCE["float64" if traits.compute_dtype == torch.float64 else kind(traits.compute_dtype)]
    if traits.subcentres > 1 and traits.compute_dtype != torch.float64:
        tolerance = max(tolerance, _NEAREST)
    for what, expected in exact.items():
        if what == "predictions":
            # Near ones may be told apart otherwise; a third of the rows have no near one.
            wrong = (found[what] != expected).double().mean().item()
            if wrong > 0.5:
                return f"{wrong:.0%} of the predictions are not those of {oracle!r}"
            continue
        error = ((found[what].double() - expected).norm() / expected.norm()).item()
        allowed = tolerance + torch.finfo(found[what].dtype).eps  # it is rounded at the end
        if not error < allowed:
            return f"the {what} differs by {error:.1e} from that of {oracle!r}, {allowed:.0e} allowed"
    return None
