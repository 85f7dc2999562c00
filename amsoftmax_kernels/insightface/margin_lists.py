"""A config's margin_list as a margin object."""

from __future__ import annotations

from collections.abc import Sequence

from ..margins import AdditiveMargin, AngularMargin
from ..values import is_number, plain


def margin_of(margin_list: Sequence[float]) -> AdditiveMargin | AngularMargin:
    """What a config's ``margin_list = (m1, m2, m3)`` means to InsightFace's ``CombinedMarginLoss``, as a margin object.

    (1, m2, 0) is ArcFace, cos(θ + m2), computed without gradient as there: dψ/dt = 1, and nothing is replaced beyond
    θ + m2 = π. With m3 > 0 it is CosFace, t − m3, whatever m1 and m2 are. Their code takes no others
    (``arcface_torch/losses.py`` since December 2022); :class:`amsoftmax_kernels.margins.CombinedMargin` takes all three.

    Raises:
        TypeError, ValueError: not three numbers, or three that InsightFace refuses too.

    Example:
        >>> from amsoftmax_kernels import AMSoftmaxLoss
        >>> from amsoftmax_kernels.insightface import margin_of
        >>> head = AMSoftmaxLoss(512, 1000, scale=64.0, margin=margin_of((1.0, 0.5, 0.0)))
        >>> head.margin
        AngularMargin(margin=0.5, beyond='cos', gradient='straight_through')
        >>> margin_of((1.0, 0.0, 0.4))
        AdditiveMargin(margin=0.4)
    """
    margins = [plain(each) for each in margin_list]
    if len(margins) != 3:
        raise ValueError(f"margin_list must be (m1, m2, m3), but it has {len(margins)} elements")
    if not all(map(is_number, margins)):
        raise TypeError(f"margin_list must hold floats, but it is {tuple(margins)}")
    m1, m2, m3 = map(float, margins)
    if m1 == 1 and m3 == 0:
        return AngularMargin(m2, gradient="straight_through")
    if m3 > 0:
        return AdditiveMargin(m3)
    raise ValueError(
        f"margin_list must be (1, m2, 0) or have m3 > 0, as InsightFace's code asks too, but it is {(m1, m2, m3)}"
    )
