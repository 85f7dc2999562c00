"""Additive-margin softmax (AM-Softmax, CosFace) heads that never hold the B×C logits."""

from . import margins, reference
from .backends import available_backends
from .functional import AMSoftmaxFunction, am_softmax_loss
from .modules import AMSoftmaxLoss

__version__ = "0.1.0"

__all__ = [
    "AMSoftmaxFunction",
    "AMSoftmaxLoss",
    "am_softmax_loss",
    "available_backends",
    "margins",
    "reference",
]
