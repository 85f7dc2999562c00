"""Additive-margin softmax (AM-Softmax, CosFace) heads that never hold the B×C logits."""

import importlib
from typing import TYPE_CHECKING, Any

from . import margins, reference
from .backends import available_backends
from .functional import AMSoftmaxFunction, am_softmax_loss
from .modules import AMSoftmaxLoss
from .resizing import resize_classes

if TYPE_CHECKING:
    from . import insightface, optim
    from .sharded.module import ShardedAMSoftmaxLoss

__version__ = "0.1.0"

__all__ = [
    "AMSoftmaxFunction",
    "AMSoftmaxLoss",
    "ShardedAMSoftmaxLoss",
    "am_softmax_loss",
    "available_backends",
    "insightface",
    "margins",
    "optim",
    "reference",
    "resize_classes",
]


# What needs torch.distributed.tensor, half a second of import, only where it is asked for.
def __getattr__(name: str) -> Any:
    if name == "ShardedAMSoftmaxLoss":
        from .sharded.module import ShardedAMSoftmaxLoss

        return ShardedAMSoftmaxLoss
    if name in ("insightface", "optim"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
