"""`torchrun -m tests.dying train ...`: `python -m bench train` whose second rank is killed right after a checkpoint.

The launcher is stopped first, or it might end the other rank before that notices by itself.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from bench.__main__ import main
from bench.train.checkpoint import Checkpoints

STEP = 60
_save = Checkpoints.save


def save(self: Checkpoints, training: Any) -> None:
    _save(self, training)
    if training.step == STEP and self.ranks.rank == 1:
        os.kill(os.getppid(), signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    Checkpoints.save = save  # type: ignore[method-assign]
    sys.exit(main())
