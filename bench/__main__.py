"""`python -m bench COMMAND`: the benchmarks. Each command's module is imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "faces": "train on real faces with each loss, verify on people never seen in training",
    "loss": "time the loss beside its peers and the floor, with peak memory",
    "kernels": "compile every Triton kernel without a GPU, read the machine code, estimate times",
    "gpu": "everything that needs a GPU: checks, CUDA graphs, times beside the peers and the floor, a profile",
    "train": "train end to end, classes sharded over the ranks that torchrun starts, verify on identities never seen",
    "plan": "what a run needs before it is paid for: memory a rank, bytes on the wire, time a step",
    "tune": "time candidate tiles of the Triton kernel on this GPU, print the table",
}

MODULES = {"tune": "kernels.tune"}  # the others' are called command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` (default: the command line) names; its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    chosen = arguments[0] if arguments and arguments[0] in COMMANDS else None
    if chosen is None:
        parser.parse_args(arguments)  # prints the help or the error, and exits
        return 2
    module = importlib.import_module(f"bench.{MODULES.get(chosen, f'{chosen}.command')}")
    module.add_arguments(parsers[chosen])
    status: int = module.run(parser.parse_args(arguments))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
