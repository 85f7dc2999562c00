"""CUTLASS's headers, which Hopper's own kernels take: how they are found, and a build with and without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from amsoftmax_kernels import __main__ as command
from amsoftmax_kernels import backends
from amsoftmax_kernels.backends.cuda import build


def _commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: str) -> list[list[str]]:
    """What a build would run."""
    commands: list[list[str]] = []

    def run(command: list[str]) -> None:
        commands.append(command)
        Path(command[-1]).touch()

    monkeypatch.setattr(build, "_run", run)
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    build.build([arch], tmp_path / "library.so")
    return commands


def _headers(at: Path, version: tuple[int, int, int] = (4, 2, 0)) -> Path:
    (at / "cutlass").mkdir(parents=True)
    names = zip(("MAJOR", "MINOR", "PATCH"), version, strict=True)
    (at / "cutlass" / "version.h").write_text("".join(f"#define CUTLASS_{name} {number}\n" for name, number in names))
    return at


def test_cutlass_is_for_hopper_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    headers = _headers(tmp_path / "include")
    monkeypatch.setattr(build, "find_cutlass", lambda: headers)
    commands = _commands(monkeypatch, tmp_path, "90a")
    with_it = [each for each in commands if str(headers) in each]
    sources = {Path(part).name for each in with_it for part in each if part.endswith(".cu")}
    assert sources == set(build.HOPPER_SOURCES) and len(with_it) == len(sources)
    assert not any("compute_80" in part for each in with_it for part in each)
    assert all("-DAK_CUTLASS" in each for each in commands[:-1])
    for arch, found in (("80", headers), ("90a", None)):
        monkeypatch.setattr(build, "find_cutlass", lambda found=found: found)
        commands = _commands(monkeypatch, tmp_path, arch)
        parts = [part for each in commands for part in each]
        assert not any("AK_CUTLASS" in part or part.endswith(build.HOPPER_SOURCES) for part in parts)


def test_headers_that_do_not_compile_leave_the_portable_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a CUTLASS that is too old or too new; in strict builds, and of our own mistakes, an error."""
    commands: list[list[str]] = []
    faulty, said = build.HOPPER_SOURCES[0], "x.hpp(1): error: no such thing"

    def run(command: list[str]) -> None:
        commands.append(command)
        if any(part.endswith(faulty) for part in command):
            raise build.BuildError(f"{' '.join(command)}\n{said}\n")
        Path(command[-1]).touch()

    monkeypatch.setattr(build, "_run", run)
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    headers = _headers(tmp_path / "include", (3, 1, 0))
    monkeypatch.setattr(build, "find_cutlass", lambda: headers)
    monkeypatch.setattr(build, "cache", lambda: tmp_path / "cache")
    with pytest.raises(build.BuildError, match=faulty):
        build.build(["90a"], tmp_path / "library.so", strict=True)
    commands.clear()
    with pytest.warns(UserWarning, match=r"do not compile with .* CUTLASS 3\.1\.0 .*pip install .*no such thing"):
        assert build.cached("90a").is_file()
    first = commands.index(next(each for each in commands if "-DAK_CUTLASS" not in each))
    assert not any("AK_CUTLASS" in part or part.endswith(build.HOPPER_SOURCES) for each in commands[first:] for part in each)
    said = "cute/config.hpp:42:10: fatal error: cuda/std/utility: No such file or directory"
    (remark,) = build.build(["90a"], tmp_path / "library.so")
    assert f"CCCL's, which nvcc does not find: pip install {build.CCCL}" in remark and build.CUTLASS not in remark
    faulty = "rows.cu"
    with pytest.raises(build.BuildError, match=faulty):
        build.build(["90a"], tmp_path / "library.so")


def test_building_ahead_of_time_says_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "_run", lambda command: Path(command[-1]).touch())
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    for headers, arch, told in ((None, "90a", True), (_headers(tmp_path / "include"), "90a", False), (None, "80", False)):
        monkeypatch.setattr(build, "find_cutlass", lambda headers=headers: headers)
        assert build.main(["--arch", arch, "--out", str(tmp_path / "library.so")]) == 0
        printed = capsys.readouterr().out
        assert f"for sm_{arch}" in printed
        assert (
            f"but without Hopper's own kernels, which take CUTLASS's headers: pip install {build.CUTLASS}" in printed
        ) == told


def test_products_one_after_the_other_fail_a_strict_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of which ptxas only remarks."""

    def run(command: list[str]) -> str:
        Path(command[-1]).touch()
        return "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."

    monkeypatch.setattr(build, "_run", run)
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    build.build(["90a"], tmp_path / "library.so")
    with pytest.raises(build.BuildError, match="instructions are serialized"):
        build.build(["90a"], tmp_path / "strict.so", strict=True)
    assert not (tmp_path / "strict.so").exists()


def test_finding_cutlass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    headers = _headers(tmp_path / "named" / "include")
    for named in (headers, headers.parent):
        monkeypatch.setenv("CUTLASS_PATH", str(named))
        assert build.find_cutlass() == headers
    assert build.cutlass_version(headers) == "4.2.0"
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    assert build.find_cutlass() is None
    # The package is found without being imported, which would import a good deal.
    monkeypatch.delenv("CUTLASS_PATH")
    package = tmp_path / "site" / "cutlass_library"
    _headers(package / "source" / "include")
    (package / "__init__.py").write_text("raise RuntimeError\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert build.find_cutlass() == package / "source" / "include"


def test_the_cache_key_depends_on_cutlass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = {build.key("80")}
    for headers in (None, _headers(tmp_path / "a"), _headers(tmp_path / "b", (4, 3, 0))):
        monkeypatch.setattr(build, "find_cutlass", lambda headers=headers: headers)
        keys |= {build.key("80"), build.key("90a")}
    assert len(keys) == 4


@pytest.mark.parametrize("headers", [True, False])
def test_the_command_says_what_to_install(
    headers: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _headers(tmp_path / "include") if headers else None
    monkeypatch.setattr(build, "find_cutlass", lambda: found)
    monkeypatch.setattr(backends, "NAMES", ("cuda",))
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert ("CUTLASS 4.2.0" in printed) == headers and (f"pip install {build.CUTLASS}" in printed) != headers
