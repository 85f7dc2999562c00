"""The head sharded over the classes: the module, its autograd function, and who holds which classes."""

from .module import ShardedAMSoftmaxLoss

__all__ = ["ShardedAMSoftmaxLoss"]
