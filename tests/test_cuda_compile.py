"""csrc/cuda as nvcc compiled it, on machines without a GPU too: every kernel for every target, its
registers, no spills, and the width of its accesses.

What is looked at are the objects of the last build (`make install`), so that nothing is compiled
twice.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import aot
import pytest
from emulator import native

from fastffn.doctor import read_build_record

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TARGETS = {f"sm_{number}" for number in native().CUDA_ARCHS}
# With as many, a block of 256 threads fits the 65536 registers of a multiprocessor.
MOST_REGISTERS = 255


@cache
def cuobjdump(source: Path, *options: str) -> str:
    """What cuobjdump says of a source's object in the build folder."""
    record = read_build_record()
    if not record.get("cuda", {}).get("built"):
        pytest.skip(f"csrc was built without CUDA: {record.get('cuda', {}).get('reason')}")
    tool = shutil.which("cuobjdump") or aot._CUOBJDUMP
    folder = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    made = ROOT / "build" / folder / "cuda" / f"{source.name}.o"
    if not made.is_file():
        pytest.skip(f"the build folder has no {made.name}: csrc was built elsewhere")
    done = subprocess.run([tool, *options, made], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_kernel_is_there_for_every_target_without_spills(source):
    usage = cuobjdump(source, "--dump-resource-usage")
    sections = re.split(r"^arch = (sm_\d+)$", usage, flags=re.MULTILINE)[1:]
    kernels = {}
    for target, section in zip(sections[::2], sections[1::2], strict=True):
        found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", section)
        for name, registers, stack, local in found:
            kernels.setdefault(target, []).append(name)
            assert int(registers) <= MOST_REGISTERS, (target, name)
            assert (int(stack), int(local)) == (0, 0), f"{name} spills on {target}"
    assert kernels.keys() == TARGETS
    for target, names in kernels.items():
        assert len(names) == 2, f"float and double on {target}: {names}"
    assert "Fatbin ptx code" in usage  # for devices that are newer than the targets


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_accesses_are_of_16_bytes(source):
    """To memory where rows allow it, to the registers in shared memory always."""
    sass = cuobjdump(source, "-sass", "-arch", "sm_90")
    for access in ("LDG.E.128", "STG.E.128", "LDS.128", "STS.128"):
        assert f"{access} " in sass, access
    assert not re.search(r"\b(LDL|STL)\b", sass), "local memory is used"
    assert not re.search(r"\bST\.E\b", sass), "a store does not know which memory it goes to"
