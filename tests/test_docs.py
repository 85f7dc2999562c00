"""README.md and docs/: every Python block runs, every link leads somewhere; the examples in docstrings run too.

What a block's fence says after its three backticks decides what becomes of it:

- ``python``: run in this process, after the blocks above it on the page and with their names;
- ``python ranks=2``: a script of its own, run on two ranks over gloo as torchrun would run it;
- ``python no-run: REASON``: only compiled, and the reader sees why;
- another language, named: not Python. A fence without a language is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import importlib
import inspect
import io
import os
import re
import socket
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import amsoftmax_kernels as ak

from .ranks import TIMEOUT, Ranks

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_LANGUAGES = {"console", "text"}
# README.md is shown on PyPI too, so that its links are absolute: with this before them they mean files of this tree.
IN_REPOSITORY = re.compile(r"https://github\.com/OWNER/amsoftmax-kernels/(?:blob|raw|tree)/main/")
CODE_BLOCK = re.compile(r"^( *)```(.*?)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    page: Path
    line: int  # of its first line of code
    info: str  # what its fence says
    code: str

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = CODE_BLOCK.finditer(text)
    return [Block(page, text.count("\n", 0, each.start(3)) + 1, each[2].strip(), textwrap.dedent(each[3])) for each in found]


def prose(page: Path) -> str:
    return CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))


def compiled(block: Block) -> Any:
    """Line numbers in a traceback are those of the page."""
    return compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")


BLOCKS = [block for page in PAGES for block in blocks(page)]
SCRIPTS = [block for block in BLOCKS if block.info == "python ranks=2"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Several would wait for each other where other tests have the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    started = Ranks(2)
    yield started
    started.close()


def script(block: Block, folder: str, port: int, arguments: tuple[str, ...]) -> str:
    """On a rank: what a script prints, run as torchrun would run it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # or one rank takes the group down while the other is still connecting
    dist.destroy_process_group()  # the script makes its own
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.distributed_c10d.default_pg_timeout = TIMEOUT  # a rank whose partner has failed must not wait for half an hour
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)} | address
    os.chdir(folder)
    sys.argv = [block.page.name, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compiled(block), {"__name__": "__main__"})
    return printed.getvalue()


def run_script(ranks: Ranks, block: Block, folder: Path, *arguments: str) -> str:
    """What the first rank prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return str(ranks.run(2, script, block, str(folder), port, arguments)[0])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.info == "python":
            exec(compiled(block), names)
    if page.name == "README.md":  # its example trains
        losses = [float(value) for value in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
        assert len(losses) == 4 and losses[-1] < losses[0] / 2


@pytest.mark.parametrize("block", SCRIPTS, ids=lambda block: block.name)
def test_a_script_runs_on_two_ranks(block: Block, two_ranks: Ranks, tmp_path: Path) -> None:
    run_script(two_ranks, block, tmp_path)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_no_block_is_left_out_silently(block: Block) -> None:
    language, _, rest = block.info.partition(" ")
    if language == "python":
        assert rest in ("", "ranks=2") or re.fullmatch(r"no-run: \w.{9,}", rest), block.info
        compiled(block)
    else:
        assert block.info in OTHER_LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_python_stands_outside_of_blocks(page: Path) -> None:
    rest = prose(page)
    assert "```" not in rest, "a fence that is not closed, or indented otherwise than its end"
    assert not re.search(r"^ {4,}(import|from|with|for|head|loss) .*", rest, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and others make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        local, inside = IN_REPOSITORY.subn("", link)
        if not inside and link.startswith("https://"):
            continue
        assert inside or page.name != "README.md", f"{link}: PyPI does not know relative links"
        path, _, anchor = local.partition("#")
        target = (ROOT if inside else page.parent) / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert text.count("\n") <= 130 and len(prose(PAGES[0]).split()) <= 1000


def test_the_sharded_script_resumes(two_ranks: Ranks, tmp_path: Path) -> None:
    """To the bit: 20 steps and 20 more are 40 steps."""
    block = next(block for block in SCRIPTS if block.page.name == "sharded.md")
    (whole := tmp_path / "whole").mkdir()
    (parts := tmp_path / "parts").mkdir()
    expected = run_script(two_ranks, block, whole, "40").splitlines()
    first, second = (run_script(two_ranks, block, parts, steps).splitlines() for steps in ("20", "40"))
    assert second[0] == "resumed after step 20"
    assert first + second[1:] == expected and len(expected) == 4


def _is_result(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or (inspect.isclass(value) and issubclass(value, tuple))


def exported() -> Iterator[tuple[str, Any]]:
    """What a user can import: functions and classes of the package itself, and of the modules that it exports."""
    for name in ak.__all__:
        found = getattr(ak, name)
        if not inspect.ismodule(found):
            yield name, found
            continue
        if hasattr(
            found, "__path__"
        ):  # a package exports what it lists; results and records of its functions need no example
            listed = ((inner, getattr(found, inner)) for inner in found.__all__)
            yield from ((f"{name}.{inner}", value) for inner, value in listed if not _is_result(value))
            continue
        for inner, value in vars(found).items():
            public = inspect.isclass(value) if name == "margins" else inspect.isclass(value) or inspect.isfunction(value)
            if public and not inner.startswith("_") and value.__module__ == found.__name__:
                yield f"{name}.{inner}", value


PRIVATE = {"reference.cosine", "reference.loss_of"}


@pytest.mark.parametrize("name, value", list(exported()), ids=lambda each: each if isinstance(each, str) else "")
def test_the_example_in_a_docstring_runs(name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in PRIVATE:
        return
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(value.__module__)
    examples = doctest.DocTestFinder(recurse=False).find(value, name, module, globs={})
    assert examples and examples[0].examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(examples[0]).failed == 0, f"the example of {name} fails: its output is above"
