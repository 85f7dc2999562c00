"""Optimizers that update the class centres in the backward pass, some classes at a time: no gradient ``[C, D]`` ever exists.

Beside the centres of 512 numbers that gradient is the memory of as many more, and to write and read it is a third of what a
step moves. With sampled negatives only the rows that were drawn are read, updated or decayed.
"""

from ..sharded.mixed import mixed_parameters
from .adamw import FusedAdamW
from .sgd import FusedSGD

__all__ = ["FusedAdamW", "FusedSGD", "mixed_parameters"]
