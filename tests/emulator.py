"""csrc/cuda compiled by g++ against tests/cuda_emulator: the CUDA kernels on the CPU, as a module.

`load()` compiles at the first call, into a folder named by the content of all that goes in, so that
later runs find it, and returns the module: the functions of csrc/cuda_bindings.cpp on addresses
of CPU memory. FASTFFN_SANITIZE is heeded as in csrc/build.py; among others it finds misaligned
accesses, which a CPU forgives and a device does not.
"""

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
_HERE = Path(__file__).resolve().parent / "cuda_emulator"
_FLAGS = ["-O1", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-DFASTFFN_CUDA=1"]
_FLAGS += ["-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas"]


def native() -> ModuleType:
    """csrc/build.py as a module; it is part of no package."""
    spec = importlib.util.spec_from_file_location("fastffn_native", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _sources() -> tuple[list[Path], list[Path]]:
    """Files to compile, and all that they include."""
    csrc = ROOT / "csrc"
    sources = [csrc / "elementwise.cpp", csrc / "program.cpp"]
    sources += [*sorted(csrc.glob("cuda/*.cu")), *sorted(_HERE.glob("*.cpp"))]
    included = [csrc / "bindings.cpp", csrc / "cuda_bindings.cpp", *csrc.glob("*.def")]
    included += [*csrc.glob("*.h"), *csrc.glob("cuda/*.*h"), *_HERE.glob("*.h")]
    return sources, [*sources, *sorted(included)]


@functools.cache
def load() -> ModuleType:
    """The module `cuda_emulated`; skips the test where there is no C++ compiler."""
    build = native()
    try:
        compiler, version = build.find_compiler(os.environ)
    except build.BuildError as error:
        pytest.skip(str(error))
    sources, everything = _sources()
    checks = os.environ.get("FASTFFN_SANITIZE")
    flags = _FLAGS + [f"-fsanitize={checks}", "-g"] if checks else _FLAGS
    digest = hashlib.sha256(f"{version}{flags}{sys.version}".encode())
    for path in everything:
        digest.update(path.name.encode() + path.read_bytes())
    base = ROOT / "build" if os.access(ROOT, os.W_OK) else Path(tempfile.gettempdir())
    folder = base / ("cuda_emulator-sanitize" if checks else "cuda_emulator")
    folder.mkdir(parents=True, exist_ok=True)
    suffix = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
    path = folder / digest.hexdigest()[:16] / f"cuda_emulated{suffix}"
    with build._lock(folder):  # the first of several test workers compiles
        if not path.is_file():
            for old in folder.glob("*/cuda_emulated*"):
                shutil.rmtree(old.parent, ignore_errors=True)
            _compile(build, [*compiler, *flags], sources, folder, path)
    spec = importlib.util.spec_from_file_location("cuda_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(build, compiler: list[str], sources: list[Path], folder: Path, path: Path) -> None:
    """Compiles into `path`, which is there whole or not at all."""
    include = [f"-I{_HERE}", f"-I{ROOT / 'csrc'}", f"-isystem{build.pybind11_copy(folder)}"]
    include.append(f"-isystem{sysconfig.get_path('include')}")
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / path.name
        command = [*compiler, *include, "-x", "c++", *map(str, sources), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        path.parent.mkdir(exist_ok=True)
        made.replace(path)
