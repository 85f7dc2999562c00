"""Margins: ψ on the target's cosine, a vector of length B, differentiated by autograd.

No backend knows which margin is in use. With ψ the target's logit is ``s · ψ(t)``; every margin that touches the
target alone (additive, angular, per class, per sample) is one such function.
"""

from .adaptive import AdaFaceMargin, ElasticMargin, MagFaceMargin
from .additive import AdditiveMargin, AnnealedAdditiveMargin
from .angular import AngularMargin, CombinedMargin, SphereFaceMargin
from .protocol import Margin
from .protocol import as_margin as as_margin
from .protocol import check_value as check_value
from .protocol import count_rows as count_rows
from .protocol import reduce_rows as reduce_rows
from .protocol import target_psi as target_psi

__all__ = [
    "AdaFaceMargin",
    "AdditiveMargin",
    "AngularMargin",
    "AnnealedAdditiveMargin",
    "CombinedMargin",
    "ElasticMargin",
    "MagFaceMargin",
    "Margin",
    "SphereFaceMargin",
]
