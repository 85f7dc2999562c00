"""The build of the CUDA sources: what it takes, its cache, libraries built ahead of time, and what each failure says."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from amsoftmax_kernels.backends import cuda
from amsoftmax_kernels.backends.cuda import build
from amsoftmax_kernels.backends.cuda import library as cuda_library

from .cuda_kernels import NVCC


@NVCC
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_it_builds_without_a_spill_and_exports_the_contract(arch: str) -> None:
    """With warnings and spills as errors; from the cache where nothing has changed."""
    library = cuda_library.Library(build.cached(arch, strict=True))
    symbols = subprocess.run(["nm", "-D", "--defined-only", library.path], capture_output=True, text=True).stdout
    exported = {line.split()[-1] for line in symbols.splitlines()}
    assert exported == {*cuda_library.LAUNCHERS, *cuda_library.CONSTANTS, "ak_check"}
    triton = pytest.importorskip("triton")  # which brings a disassembler along
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", library.path]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for instruction in (
        r"HMMA\.16816\.F32\.BF16",
        r"HMMA\.1688\.F32\.TF32",
        r"LDSM",
        r"LDGSTS\.E\.BYPASS\.128",
        r"LDG\.E\.128",
        r"STG\.E\.128",
    ):
        assert re.search(rf"\b{instruction}\b", code), instruction
    assert not re.search(r"\b(LDL|STL)\b", code)


def test_the_cache_key_depends_on_what_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(build.sources(), tmp_path / "csrc")
    monkeypatch.setattr(build, "sources", lambda: tmp_path / "csrc")
    first = build.key("80")
    assert build.key("80") == first != build.key("90a")
    (tmp_path / "csrc" / "arithmetic.h").write_text("// changed\n")
    assert build.key("80") != first


@pytest.mark.parametrize("name", ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "machine", "commands"])
def test_the_cache_key_depends_on_how_it_is_compiled(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.key("80")
    if name == "machine":
        monkeypatch.setattr(platform, "machine", lambda: "another")
    elif name == "commands":
        text, found = Path(build.__file__).read_text().replace('"-O3"', '"-O2"'), build.sources()
        monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
        monkeypatch.setattr(build, "sources", lambda: found)
        (tmp_path / "build.py").write_text(text)
    else:
        monkeypatch.setenv(name, "-O0")
    assert build.key("80") != first


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
def test_a_cached_file_that_does_not_load_is_built_again_once(
    emulated_library: cuda_library.Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short, or for another machine. What is built in its place may not load either, which is an error."""
    monkeypatch.setattr(build, "cache", lambda: tmp_path)
    contents = [b"not a library either", emulated_library.path.read_bytes()]
    monkeypatch.setattr(build, "build", lambda archs, out, strict: (out.write_bytes(contents.pop(0)), [])[1])
    path = tmp_path / f"{build.key('80')}.so"
    path.write_bytes(b"not a library")
    load = cuda_library.library.__wrapped__
    with pytest.raises(OSError, match="file too short"):
        load("80")
    assert load("80").path == path and not contents
    assert load("80").path == path  # as it is
    assert build.cached("80", broken=build.written(path) - 1) == path  # another process has built it again


NVCC_11 = "sm_75\nsm_80\nsm_86\nsm_87\nsm_89\nsm_90\n"


def test_an_older_nvcc_compiles_for_what_it_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rather than for nothing: an older architecture whose code the GPU runs too, else PTX, which is always there."""
    targets: list[list[str]] = []
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(build, "_nvcc_version", lambda: "release 11.8, V11.8.89")
    monkeypatch.setattr(build, "_listed", lambda nvcc: NVCC_11)
    monkeypatch.setattr(build, "_build", lambda nvcc, architectures, *rest: targets.append(list(architectures)))
    assert build.build(["80", "89"], tmp_path / "library.so") == []
    (remark,) = build.build(["120"], tmp_path / "library.so")
    assert "does not know sm_120: PTX for compute_80 in its place" in remark
    build.build(["90a"], tmp_path / "library.so")
    monkeypatch.setattr(build, "_listed", lambda nvcc: NVCC_11.replace("sm_89\n", ""))
    remarks = build.build(["89", "86"], tmp_path / "library.so")
    assert len(remarks) == 1 and "does not know sm_89: code for sm_86 in its place" in remarks[0]
    build.build(["120"], tmp_path / "library.so", strict=True)  # there it is an error
    assert targets == [["80", "89"], [], [], ["86"], ["120"]]
    monkeypatch.setattr(build, "_nvcc_version", lambda: "release 12.0, V12.0.76")
    assert build._known("90a", NVCC_11) == "90a" and build._known("121", "sm_120") == "120"
    assert build._known("120", "") == "120"  # one that does not tell is taken to know


@NVCC
def test_nvcc_says_what_it_knows() -> None:
    nvcc = build.find_nvcc()
    assert nvcc is not None and build._known("90a", build._listed(nvcc)) == "90a"
    assert build._known("80", build._listed(nvcc)) == "80" and build._known("999", build._listed(nvcc)) is None


def test_architectures() -> None:
    for capability, expected in (
        ((8, 0), "80"),
        ((8, 6), "86"),
        ((8, 7), "87"),
        ((8, 8), "86"),
        ((10, 1), "100"),
        ((13, 0), "80"),
        ((8, 9), "89"),
        ((9, 0), "90a"),
        ((12, 1), "121"),
    ):
        assert build.architecture(capability) == expected


def test_without_nvcc_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert "install the CUDA toolkit" in (build.missing() or "")
    with pytest.raises(build.BuildError, match="nvcc"):
        build.build(["80"], tmp_path / "library.so")


def test_a_library_built_ahead_of_time_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setenv("AMSOFTMAX_KERNELS_LIBRARY", str(tmp_path / "library.so"))
    assert "which is not there" in (build.missing() or "")
    (tmp_path / "library.so").write_bytes(b"")
    assert build.missing() is None and build.prebuilt() == tmp_path / "library.so"
    monkeypatch.chdir(tmp_path)  # a bare name is here, not where the loader looks for libraries
    monkeypatch.setenv("AMSOFTMAX_KERNELS_LIBRARY", "library.so")
    assert build.missing() is None and build.prebuilt() == tmp_path / "library.so"


def test_a_library_in_the_cache_serves_without_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The newest of these sources, whichever nvcc built it; not one of others."""
    monkeypatch.setattr(build, "cache", lambda: tmp_path)
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    kept = []
    for age, version in ((20, "release 12.8"), (10, "release 13.0")):
        monkeypatch.setattr(build, "_nvcc_version", lambda version=version: version)
        kept.append(build.path_of("80"))
        kept[-1].touch()
        os.utime(kept[-1], (time.time() - age,) * 2)
    (tmp_path / "sm_80-of-other-sources.so").touch()
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setattr(build, "_nvcc_version", lambda: "")
    assert kept[0] != kept[1] and build.path_of("80") == build.cached("80") == kept[1]
    assert build.missing("80") is None
    for arch in ("90a", ""):
        assert "install the CUDA toolkit" in (build.missing(arch) or "")
    with pytest.raises(build.BuildError, match="install the CUDA toolkit"):
        build.cached("80", broken=build.written(kept[1]))


def test_a_cache_that_cannot_be_written_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(build, "cache", lambda: tmp_path / "file" / "amsoftmax_kernels")
    with pytest.raises(build.BuildError, match=r"file/amsoftmax_kernels \(.*XDG_CACHE_HOME .*AMSOFTMAX_KERNELS_LIBRARY"):
        build.cached("80")


@pytest.mark.filterwarnings("ignore:amsoftmax_kernels")
def test_a_driver_that_is_too_old_is_found_before_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And once: the reason stays."""
    asked: list[object] = []
    monkeypatch.setattr(build, "cache", lambda: tmp_path)
    monkeypatch.setattr(build, "find_nvcc", lambda: "/somewhere/nvcc")
    monkeypatch.setattr(build, "_nvcc_version", lambda: "Cuda compilation tools, release 13.0, V13.0.48")
    monkeypatch.setattr(build, "build", lambda *_: 1 / 0)
    monkeypatch.setattr(build, "driver_version", lambda: (asked.append(None), (12, 4))[1])
    monkeypatch.setattr(cuda, "_failed", {})
    monkeypatch.setattr(cuda, "_library", cuda._library.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    said = r"/somewhere/nvcc is of CUDA 13\.0, and this machine's driver runs CUDA 12\.4: .*a toolkit of CUDA 12 .*CUDA_HOME"
    for _ in range(2):
        assert re.search(said, cuda.refusal(torch.device("cuda", 0), torch.float16) or "")
    assert len(asked) == 1
    for version in ((13, 0), (14, 1), None):
        monkeypatch.setattr(build, "driver_version", lambda version=version: version)
        assert build.too_new() is None


VERSION = f'extern "C" int ak_version() {{ return {cuda_library.VERSION}; }}'


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('extern "C" int ak_version() { return 1; } extern "C" int ak_has_hopper() { return 0; }', "has version 1 .*again"),
        ("", "not a lib"),
        (VERSION, "other.so has no ak_contract.*build it again"),
        (VERSION + 'extern "C" int ak_contract() { return 7; }', "has other structures in its interface.*build it again"),
        (f'{VERSION} extern "C" int ak_contract() {{ return {build.contract()}; }}', "has no ak_prepare_rows"),
    ],
    ids=["outdated", "another", "before a function", "other structures", "without a launcher"],
)
def test_another_library_is_refused_in_words(source: str, message: str, tmp_path: Path) -> None:
    """Also one from before a function was there: then other backends serve."""
    (tmp_path / "other.cpp").write_text(source)
    subprocess.run(["g++", "-shared", "-fPIC", tmp_path / "other.cpp", "-o", tmp_path / "other.so"], check=True)
    with pytest.raises(build.BuildError, match=message):
        cuda_library.Library(tmp_path / "other.so")


def test_the_contract_changes_with_the_structures_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, first = (build.sources() / "library.h").read_text(), build.contract()
    monkeypatch.setattr(build, "sources", lambda: tmp_path)
    for changed, same in (
        (text + "\n// a remark\n", True),
        (text.replace("int64_t batch, width", "int64_t width, batch"), False),
    ):
        assert changed != text
        (tmp_path / "library.h").write_text(changed)
        assert (build.contract() == first) == same


@NVCC
def test_a_failed_build_shows_the_compilers_message_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "library.h").write_text("")
    (tmp_path / "csrc" / "broken.cu").write_text("this is not C++\n")
    monkeypatch.setattr(build, "sources", lambda: tmp_path / "csrc")
    assert build.main(["--arch", "80", "--out", str(tmp_path / "library.so")]) == 1
    assert "broken.cu" in capsys.readouterr().out
    assert {each.name for each in tmp_path.iterdir()} == {"csrc"}


@NVCC
def test_eight_processes_share_one_build(tmp_path: Path) -> None:
    """As eight ranks that start at once do."""
    import sys

    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "library.h").write_text("")
    (tmp_path / "csrc" / "one.cu").write_text('extern "C" int one() { return 1; }\n')
    script = (
        "from pathlib import Path; from amsoftmax_kernels.backends.cuda import build; "
        f"build.sources = lambda: Path({str(tmp_path / 'csrc')!r}); first = build.build; "
        "build.build = lambda *args: (print('built'), first(*args))[1]; print(build.cached('80'))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(8)]
    outputs = [each.communicate(timeout=120)[0] for each in running]
    assert all(each.returncode == 0 for each in running)
    assert sum("built" in each for each in outputs) == 1 and len({each.splitlines()[-1] for each in outputs}) == 1
