"""The build of csrc: ninja, the instruction sets, the record, and what happens when it fails."""

import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fastffn.doctor import read_build_record
from fastffn.expr import primitives

ROOT = Path(__file__).resolve().parent.parent

# A plain shared library: the module of the real tree compiles pybind11, which takes seconds.
MODULE_SOURCE = """
#include "cpu/name.h"
extern "C" __attribute__((visibility("default"))) const char* names() { return all_names(); }
"""
HEADER = "#pragma once\nconst char* all_names();\n"
DISPATCH_SOURCE = """
#include "cpu/name.h"
#include <string>
namespace baseline { const char* name(); }
#ifdef FASTFFN_HAVE_X86_ISA
namespace avx2 { const char* name(); }
namespace avx512 { const char* name(); }
static const std::string all = std::string(baseline::name()) + avx2::name() + avx512::name();
#else
static const std::string all = baseline::name();
#endif
const char* all_names() { return all.c_str(); }
"""
ISA_SOURCE = """
namespace FASTFFN_ISA {
#if defined(__AVX512F__)
const char* name() { return "512"; }
#elif defined(__AVX2__)
const char* name() { return "256"; }
#else
const char* name() { return "any"; }
#endif
}
"""


@pytest.fixture(scope="module")
def native():
    """csrc/build.py as a module; it is part of no package."""
    spec = importlib.util.spec_from_file_location("fastffn_native", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    """A source tree with four tiny files, and a folder for the module."""
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "csrc" / "module.cpp").write_text(MODULE_SOURCE)
    (tmp_path / "csrc" / "cpu" / "name.h").write_text(HEADER)
    (tmp_path / "csrc" / "cpu" / "dispatch.cpp").write_text(DISPATCH_SOURCE)
    (tmp_path / "csrc" / "cpu" / "name.isa.cpp").write_text(ISA_SOURCE)
    return tmp_path


@pytest.fixture
def compilers(native):
    """The environment's settings, with this machine's compiler, or a skip where there is none."""
    try:
        native.find_compiler({})
        native.find_ninja()
    except native.BuildError as error:
        pytest.skip(str(error))
    return {"PATH": "/nowhere"}


def names(module):
    """What the tree's library answers, asked in a process of its own."""
    code = (
        "import ctypes, sys; names = ctypes.CDLL(sys.argv[1]).names; "
        "names.restype = ctypes.c_char_p; print(names().decode())"
    )
    command = [sys.executable, "-c", code, str(module)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_builds_every_isa_and_only_what_changed(native, tree, compilers, capfd):
    record = native.build(tree / "out", root=tree, env=compilers)
    assert record["status"] == "built", record["error"]
    assert json.loads((tree / "out" / native.RECORD).read_text()) == record
    x86 = platform.machine() in ("x86_64", "AMD64")
    assert record["isas"] == (["baseline", "avx2", "avx512"] if x86 else ["baseline"])
    assert names(tree / "out" / native.MODULE) == ("any256512" if x86 else "any")
    assert record["cuda"] == {"built": False, "reason": "csrc holds no CUDA sources"}
    assert "-march=native" not in record["flags"]

    module = tree / "out" / native.MODULE
    before = module.stat()
    capfd.readouterr()
    native.build(tree / "out", root=tree, env=compilers)
    assert "no work to do" in capfd.readouterr().out
    assert (module.stat().st_ino, module.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    (tree / "csrc" / "cpu" / "name.h").write_text(HEADER + "// changed\n")
    native.build(tree / "out", root=tree, env=compilers)
    rebuilt = capfd.readouterr().out
    assert "module.cpp.o" in rebuilt and "dispatch.cpp.o" in rebuilt
    assert "name.isa" not in rebuilt


def test_failed_build_is_recorded_and_leaves_no_stale_module(native, tree, compilers):
    module = tree / "out" / native.MODULE
    module.write_bytes(b"of an earlier build")
    (tree / "csrc" / "cpu" / "dispatch.cpp").write_text("int wrong = ;\n")
    record = native.build(tree / "out", root=tree, env=compilers, quiet=True)
    assert record["status"] == "failed"
    assert "dispatch.cpp:1" in record["error"]
    assert not module.exists()
    assert read_build_record(tree / "out" / native.RECORD) == record


def test_failing_compiler_is_recorded(native, tree):
    record = native.build(tree / "out", root=tree, env={"CXX": "false"}, quiet=True)
    assert record["status"] == "failed"
    assert record["error"] == ("the C++ compiler CXX=false does not run; correct or unset CXX")


def test_required_build_raises_and_records(native, tree):
    env = {"CXX": "false", "FASTFFN_REQUIRE_BUILD": "1"}
    with pytest.raises(native.BuildError, match="CXX=false"):
        native.build(tree / "out", root=tree, env=env, quiet=True)
    assert read_build_record(tree / "out" / native.RECORD)["status"] == "failed"


def test_record_of_a_machine_without_compiler(native, tree, monkeypatch):
    monkeypatch.setattr(native, "_first_line", lambda command: None)
    record = native.build(tree / "out", root=tree, env={}, quiet=True)
    assert record["error"].startswith("no C++ compiler")


def test_cuda_wish_without_nvcc_is_an_error(native, monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(native.SettingError, match="FASTFFN_CUDA=1: no nvcc"):
        native.find_nvcc({"FASTFFN_CUDA": "1"})
    assert native.find_nvcc({})[0] is None
    with pytest.raises(native.SettingError, match="FASTFFN_CUDA=yes"):
        native.find_nvcc({"FASTFFN_CUDA": "yes"})


def test_broken_cuda_toolkit_costs_the_cuda_part_alone(native, tree, compilers):
    (tree / "csrc" / "cuda").mkdir()
    (tree / "csrc" / "cuda" / "twice.cu").write_text("__global__ void twice() {}\n")
    nvcc = tree / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\n[ "$1" = --list-gpu-arch ] && exec echo compute_80\nexit 1\n')
    nvcc.chmod(0o755)
    env = {**compilers, "CUDA_HOME": str(tree / "toolkit")}

    record = native.build(tree / "out", root=tree, env=env, quiet=True)
    assert record["status"] == "built"
    assert not record["cuda"]["built"] and "CUDA build failed" in record["cuda"]["reason"]
    assert "-DFASTFFN_CUDA=1" not in record["flags"]

    record = native.build(tree / "out", root=tree, env={**env, "FASTFFN_CUDA": "1"}, quiet=True)
    assert record["status"] == "failed" and "FASTFFN_CUDA=0 builds without" in record["error"]


def test_installed_record_agrees_with_the_module():
    record = read_build_record()
    loads = importlib.util.find_spec("fastffn._C") is not None
    assert record["status"] == ("built" if loads else "failed"), record.get("error")
    assert record["error"] is None or record["status"] == "failed"


def test_module_knows_nothing_of_torch():
    spec = importlib.util.find_spec("fastffn._C")
    if spec is None:
        pytest.skip(f"csrc was not built: {read_build_record()['error']}")
    binary = Path(spec.origin).read_bytes()
    for name in (b"libtorch", b"libc10", b"_ZN2at", b"_ZN3c10", b"torch/csrc"):
        assert name not in binary


def test_primitives_are_found():
    assert primitives.table_path().is_file()
    assert "gelu_erf" in primitives.primitives()


def test_kernels_are_importable_only_below_fastffn(tmp_path):
    code = (
        "import importlib.util as u; "
        "print(u.find_spec('kernels'), u.find_spec('csrc'), u.find_spec('fastffn.kernels').origin)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    top, csrc, ours = done.stdout.split(maxsplit=2)
    assert (top, csrc) == ("None", "None")
    assert Path(ours.strip()).parent.name == "kernels"


def test_other_platforms_are_refused(native, tree, monkeypatch):
    monkeypatch.setattr(native.sys, "platform", "darwin")
    record = native.build(tree / "out", root=tree, env={})
    assert record["status"] == "failed"
    assert record["error"] == "csrc is written for Linux, not for darwin"
