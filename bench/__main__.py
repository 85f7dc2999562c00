"""`python -m bench COMMAND`: the benchmarks. Each command's module is imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """A module with ``add_arguments`` and ``run``, and what it does."""

    module: str
    text: str


USERS = {
    "train": Command("train.command", "train end to end, classes sharded over ranks; verify on identities never seen"),
    "plan": Command("plan.command", "what a run needs before it is paid for: memory a rank, bytes on the wire, time a step"),
    "verify": Command("verify.command", "judge features that are in files: LFW, BLUFR, MegaFace, IJB, all pairs"),
    "faces": Command("faces.command", "train on real faces with each loss, verify on people never seen in training"),
    "loss": Command("loss.command", "a step of the loss beside other libraries', which take turns; with peak memory"),
    "gpu": Command("gpu.command", "all that needs a GPU: checks, CUDA graphs, times beside other libraries, a profile"),
}
DEVELOPERS = {
    "kernels": Command("kernels.command", "compile the Triton kernels without a GPU, read the machine code, estimate times"),
    "tune": Command("kernels.tune", "time candidate tiles of the Triton kernels on this GPU, print the table"),
}
COMMANDS = USERS | DEVELOPERS


def _help() -> str:
    lines = ["Times of single steps, stored and compared by pytest-benchmark: pytest bench --benchmark-only"]
    for title, commands in (("for users", USERS), ("for developers of the kernels", DEVELOPERS)):
        lines += ["", f"{title}:", *(f"  {name:9}{command.text}" for name, command in commands.items())]
    return "\n".join([*lines, "", "python -m bench COMMAND --help has a command's options"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` (default: the command line) names; its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=_help(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", help="one of those above")
    parsers = {name: commands.add_parser(name, description=command.text) for name, command in COMMANDS.items()}
    chosen = arguments[0] if arguments and arguments[0] in COMMANDS else None
    if chosen is None:
        parser.parse_args(arguments)  # prints the help or the error, and exits
        return 2
    module = importlib.import_module(f"bench.{COMMANDS[chosen].module}")
    module.add_arguments(parsers[chosen])
    status: int = module.run(parser.parse_args(arguments))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
