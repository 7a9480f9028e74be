"""Builds csrc into one extension module, with ninja. Knows nothing of setuptools or torch.

What comes out: `_C<EXT_SUFFIX>` and `_build.json`, the record of how it was built or why not, side
by side in a folder of the caller's choice. `setup.py` calls `build`; a developer may call
`python csrc/build.py`, which builds into fastffn/ and needs no network.

Why ninja and not setuptools' own compiler classes: the kernels are compiled once per instruction
set, each with its own flags, and only what changed is compiled again (depfiles). Why not CMake:
it would be a third build requirement for forty lines of rules. Why not torch's cpp_extension:
csrc is free of torch headers, so that one build serves every torch.

The environment steers it:
    CXX                     the compiler (else c++, else g++)
    FASTFFN_CUDA            1: nvcc or an error; 0: never; else: when nvcc is found
    FASTFFN_SANITIZE        e.g. "address,undefined"
    FASTFFN_REQUIRE_BUILD   1: a failed build is an error, not a slower library
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULE = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
RECORD = "_build.json"
ERROR_LINES = 40

BASE_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp",
    "-Wall",
    "-Wextra",
    # The compiler vectorises calls and comparisons only when neither errno nor the floating-point
    # exception flags are observable; nothing here reads them. NaN and infinity keep their meaning.
    "-fno-math-errno",
    "-fno-trapping-math",
]

# In link order: of an inline function that several objects hold, the linker keeps the first copy,
# and that copy must run on every machine.
X86_ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
CUDA_ARCHS = ["80", "90", "100"]


class BuildError(Exception):
    """The extension cannot be built here; the library works without it, more slowly."""


class SettingError(BuildError):
    """The environment asks for what this machine cannot do: never passed over in silence."""


@dataclass
class Plan:
    """Everything that ninja is told, and what the record says about it."""

    compiler: list[str]
    compiler_version: str
    flags: list[str]
    isas: dict[str, list[str]]
    objects: list[tuple[str, Path, str, list[str]]] = field(default_factory=list)
    nvcc: str | None = None
    nvcc_flags: list[str] = field(default_factory=list)
    cuda_reason: str = ""

    def record(self) -> dict:
        return {
            "compiler": shlex.join(self.compiler),
            "compiler_version": self.compiler_version,
            "flags": self.flags,
            "isas": list(self.isas),
            "cuda": {"built": self.nvcc is not None, "reason": self.cuda_reason},
        }


def _first_line(command: list[str]) -> str | None:
    """First line that a command prints, or None when it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return (done.stdout.splitlines() or [""])[0]


def find_compiler(env: Mapping[str, str]) -> tuple[list[str], str]:
    """The C++ compiler's command and the first line of its --version."""
    wished = env.get("CXX")
    for candidate in [wished] if wished else ["c++", "g++"]:
        command = shlex.split(candidate)
        if version := _first_line([*command, "--version"]):
            return command, version
    if wished:
        raise BuildError(f"the C++ compiler CXX={wished} does not run; correct or unset CXX")
    raise BuildError("no C++ compiler: neither c++ nor g++ runs; install one or set CXX")


def find_ninja() -> str:
    """ninja of the pip package, else of PATH."""
    with contextlib.suppress(ImportError):
        import ninja

        packaged = Path(ninja.BIN_DIR) / "ninja"
        if packaged.is_file():
            return str(packaged)
    if found := shutil.which("ninja"):
        return found
    raise BuildError("no ninja: run pip install ninja")


def find_nvcc(env: Mapping[str, str]) -> tuple[str | None, str]:
    """nvcc and an empty reason, or None and why CUDA is left out. Asks for no device."""
    wish = env.get("FASTFFN_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SettingError(f"FASTFFN_CUDA={wish}: give 0, 1 or leave it unset")
    if wish == "0":
        return None, "switched off by FASTFFN_CUDA=0"
    homes = [env.get("CUDA_HOME"), env.get("CUDA_PATH"), "/usr/local/cuda"]
    path = os.pathsep.join([f"{home}/bin" for home in homes if home] + [env.get("PATH", "")])
    if found := shutil.which("nvcc", path=path):
        return found, ""
    if wish == "1":
        raise SettingError(
            "FASTFFN_CUDA=1: no nvcc in CUDA_HOME, CUDA_PATH or PATH; "
            "install the CUDA toolkit or unset FASTFFN_CUDA"
        )
    return None, "no nvcc in CUDA_HOME, CUDA_PATH or PATH"


def cuda_flags(nvcc: str, compiler: list[str]) -> list[str]:
    """nvcc's flags: the targets that this nvcc knows, and PTX of the newest for later devices."""
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    known = set(listing.stdout.split())
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]
    if not archs:
        raise BuildError(f"{nvcc} knows none of sm_{', sm_'.join(CUDA_ARCHS)}; update CUDA")
    flags = ["-O3", "-std=c++20", "--cudart=static", f"-ccbin={compiler[-1]}"]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-fopenmp"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def pybind11_copy(folder: Path) -> Path:
    """pybind11's headers under `folder`: an isolated build's own copy is gone after the build, and
    ninja would compile everything again for its new path."""
    try:
        import pybind11
    except ImportError as error:
        raise BuildError("no pybind11: run pip install pybind11") from error
    copy = folder / f"pybind11-{pybind11.__version__}"
    if not copy.is_dir():
        partial = Path(f"{copy}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(pybind11.get_include(), partial)
        partial.rename(copy)
    return copy


def plan(root: Path, folder: Path, env: Mapping[str, str], cuda: bool = True) -> Plan:
    """What to compile and how; raises BuildError when this machine cannot.

    Args:
        root: folder that holds csrc/.
        folder: where ninja works.
        env: the environment's settings.
        cuda: False leaves the CUDA sources out whatever the machine offers.
    """
    csrc = root / "csrc"
    sources = sorted(csrc.glob("*.cpp")) + sorted(csrc.glob("cpu/*.cpp"))
    if not (csrc / "module.cpp").is_file():
        raise BuildError(f"no module.cpp in {csrc}")
    compiler, version = find_compiler(env)
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    result = Plan(compiler, version, list(BASE_FLAGS), X86_ISAS if x86 else {"baseline": []})
    result.flags += ["-DFASTFFN_HAVE_X86_ISA=1"] * x86
    if checks := env.get("FASTFFN_SANITIZE"):
        result.flags += [f"-fsanitize={checks}", "-fno-omit-frame-pointer", "-g", "-O1"]

    cuda_sources = sorted(csrc.glob("cuda/*.cu"))
    nvcc, result.cuda_reason = find_nvcc(env)
    if not cuda_sources:
        result.cuda_reason = "csrc holds no CUDA sources"
    elif nvcc and cuda:
        result.nvcc = nvcc
        result.nvcc_flags = cuda_flags(nvcc, compiler)
        result.flags += ["-DFASTFFN_CUDA=1"]

    include = [f"-I{csrc}"]
    headers = [f"-isystem{sysconfig.get_path('include')}", f"-isystem{pybind11_copy(folder)}"]
    headers += include
    for source in sources:
        name = source.relative_to(csrc).as_posix()
        if name.endswith(".isa.cpp"):
            continue
        result.objects.append((f"{name}.o", source, "cxx", headers if "/" not in name else include))
    for isa, flags in result.isas.items():
        for source in sorted(csrc.glob("cpu/*.isa.cpp")):
            name = f"cpu/{source.name.removesuffix('.cpp')}.{isa}.o"
            result.objects.append((name, source, "cxx", [*include, f"-DFASTFFN_ISA={isa}", *flags]))
    if result.nvcc:
        defines = [flag for flag in result.flags if flag.startswith("-D")]
        for source in cuda_sources:
            result.objects.append((f"cuda/{source.name}.o", source, "nvcc", [*include, *defines]))
    return result


def _shell(command: list[str]) -> str:
    return shlex.join(command).replace("$", "$$")


def _path(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_text(made: Plan) -> str:
    """The build.ninja of a plan; object paths are relative to its folder."""
    sanitize = [flag for flag in made.flags if flag.startswith("-fsanitize")]
    link = [*made.compiler, "-shared", "-fopenmp", *sanitize]
    if made.nvcc:  # nvcc knows where its static runtime lies
        host = ",".join(["-fopenmp", *sanitize])
        link = [made.nvcc, "-shared", f"-ccbin={made.compiler[-1]}", "--cudart=static"]
        link += [f"-Xcompiler={host}", "-Xlinker=--exclude-libs,ALL"]
    compiler = _shell([*made.compiler, *made.flags])
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {compiler} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $out",
        "rule link",
        f"  command = {_shell(link)} $in -o $out",
        "  description = link $out",
    ]
    if made.nvcc:
        command = _shell([made.nvcc, *made.nvcc_flags])
        lines += [
            "rule nvcc",
            f"  command = {command} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $out",
        ]
    for name, source, rule, flags in made.objects:
        lines += [f"build {_path(name)}: {rule} {_path(source)}", f"  flags = {_shell(flags)}"]
    lines += [f"build {MODULE}: link " + " ".join(_path(name) for name, *_ in made.objects)]
    return "\n".join([*lines, f"default {MODULE}", ""])


def _files():
    """fastffn/files.py without fastffn, which imports torch."""
    spec = importlib.util.spec_from_file_location("fastffn_files", ROOT / "fastffn" / "files.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One build at a time in a folder."""
    import fcntl

    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(made: Plan, folder: Path, module: Path, quiet: bool) -> None:
    """Runs ninja; puts the module in its place, whole, where another process may have it open."""
    files = _files()
    text = ninja_text(made)
    ninja_file = folder / "build.ninja"
    if not ninja_file.is_file() or ninja_file.read_text(encoding="utf-8") != text:
        files.write_text_atomic(ninja_file, text)
    done = subprocess.run(
        [find_ninja(), "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = done.stdout.decode(errors="replace")
    if not quiet:
        print(output, end="", flush=True)
    if done.returncode:
        raise BuildError("\n".join(output.strip().splitlines()[-ERROR_LINES:]))
    built = folder / MODULE
    if not module.is_file() or module.read_bytes() != built.read_bytes():
        with files.atomic_path(module) as temporary:
            shutil.copyfile(built, temporary)


def write_record(target: Path, record: dict) -> None:
    """Writes the build record into the folder `target`, unless it says so already."""
    text = json.dumps(record, indent=2) + "\n"
    path = target / RECORD
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        _files().write_text_atomic(path, text)


def build(
    target: Path,
    root: Path = ROOT,
    env: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> dict:
    """Builds the module into `target` and writes the record there.

    A failure is recorded and returned, not raised, and a module of an earlier build is removed: the
    library falls back to its slower paths and can say why. A broken CUDA toolkit costs the CUDA
    part alone.

    Args:
        target: folder for the module and the record.
        root: folder that holds csrc/; ninja works in its build/.
        env: settings (see the module's docstring); None is the process's environment.
        quiet: keep ninja's output back.
    Returns:
        The record: status ("built" or "failed"), compiler, flags, isas, cuda, and error if failed.
    Raises:
        SettingError: the environment asks for what is not there.
        BuildError: the build failed and FASTFFN_REQUIRE_BUILD is 1.
    """
    env = os.environ if env is None else env
    required = env.get("FASTFFN_REQUIRE_BUILD") == "1"
    kind = "-sanitize" if env.get("FASTFFN_SANITIZE") else ""
    folder = root / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}{kind}"
    module = target / MODULE
    made = None
    try:
        if not sys.platform.startswith("linux"):
            raise BuildError(f"csrc is written for Linux, not for {sys.platform}")
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            try:
                made = plan(root, folder, env)
                _compile(made, folder, module, quiet)
            except BuildError as error:
                has_cuda = any(root.glob("csrc/cuda/*.cu")) and find_nvcc(env)[0]
                if not has_cuda or isinstance(error, SettingError):
                    raise
                if required or env.get("FASTFFN_CUDA") == "1":
                    raise BuildError(f"{error}\nFASTFFN_CUDA=0 builds without CUDA") from error
                made = plan(root, folder, env, cuda=False)
                made.cuda_reason = f"the CUDA build failed: {error}"
                _compile(made, folder, module, quiet)
        record = {"status": "built", **made.record(), "error": None}
    except SettingError:
        raise
    except (BuildError, OSError) as error:
        facts = made.record() if made else {}
        facts["cuda"] = {"built": False, "reason": "nothing was built"}
        record = {"status": "failed", **facts, "error": str(error)}
        module.unlink(missing_ok=True)
        if required:
            write_record(target, record)
            raise BuildError(f"csrc was not built: {error}") from error
    write_record(target, record)
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description="Build csrc with ninja.")
    parser.add_argument("--into", type=Path, default=ROOT / "fastffn", help="folder of the module")
    parser.add_argument("--quiet", action="store_true", help="print nothing unless it fails")
    arguments = parser.parse_args()
    try:
        record = build(arguments.into, quiet=arguments.quiet)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    if record["status"] == "failed":
        print(f"csrc was not built: {record['error']}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
