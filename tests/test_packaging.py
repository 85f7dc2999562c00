"""What an sdist and a wheel carry: all that the tests need, and nothing that only they need. Built without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")  # older ones do not read `license = "MIT"`
ROOT = Path(__file__).parents[1]
SOURCES = ("amsoftmax_kernels", "bench", "csrc", "docs", "tests")
FILES = ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "constraints.txt", "pyproject.toml")
BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # setuptools writes over sys.argv
build_meta.build_sdist(out)
build_meta.build_wheel(out)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist and a wheel. They are built in a copy, as setuptools writes beside its sources."""
    folder = tmp_path_factory.mktemp("built")
    copy, out = folder / "copy", folder / "out"
    out.mkdir()
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", BUILD, str(out)]
    process = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return out


def files(*folders: str) -> set[str]:
    """Files of the working tree under these folders, as the archives name them."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return {str(path.relative_to(ROOT)) for path in paths if path.is_file() and "__pycache__" not in path.parts}


def test_the_sdist_can_run_its_own_tests(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert not (files(*SOURCES) | set(FILES)) - names
    assert not [name for name in names if name.startswith(".venv") or name.endswith(".pyc")]


def test_the_wheel_carries_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        names = set(archive.namelist())
        metadata = next(archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    information = {name for name in names if ".dist-info/" in name}
    kernels = {f"amsoftmax_kernels/{name}" for name in files("csrc")}
    assert names - information == files("amsoftmax_kernels") | kernels
    assert any(name.endswith("licenses/LICENSE") for name in information)
    assert "License-Expression: MIT" in metadata and "Author: the amsoftmax_kernels authors" in metadata


def test_one_address_stands_for_the_repository() -> None:
    """Its owner replaces one placeholder: README.md and pyproject.toml must have the same."""
    urls = re.findall(r'^\w+ = "(https://[^"]+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    address = urls[0]
    assert len(urls) == 4 and all(url.startswith(address) for url in urls)
    assert f"git clone {address}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
