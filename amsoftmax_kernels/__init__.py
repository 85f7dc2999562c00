"""Additive-margin softmax (AM-Softmax, CosFace) heads that never hold the B×C logits."""

import importlib
from typing import TYPE_CHECKING, Any

from . import margins, reference
from .autograd import AMSoftmaxFunction
from .backends import available_backends
from .functional import am_softmax_loss
from .modules import AMSoftmaxLoss
from .resizing import resize_classes

if TYPE_CHECKING:
    from . import evaluation, insightface, optim
    from .sharded.module import ShardedAMSoftmaxLoss

__version__ = "0.1.0"

__all__ = [
    "AMSoftmaxFunction",
    "AMSoftmaxLoss",
    "ShardedAMSoftmaxLoss",
    "am_softmax_loss",
    "available_backends",
    "evaluation",
    "insightface",
    "margins",
    "optim",
    "reference",
    "resize_classes",
]


# What needs torch.distributed.tensor or NumPy only where it is asked for: half a second of import.
def __getattr__(name: str) -> Any:
    if name == "ShardedAMSoftmaxLoss":
        from .sharded.module import ShardedAMSoftmaxLoss

        return ShardedAMSoftmaxLoss
    if name in ("evaluation", "insightface", "optim"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
