"""What every test relies on: marked tests are skipped, with the reason, where they cannot run.

FASTFFN_TEST_MODULE names a folder whose `_C` is tested instead of the installed one: see `make
sanitize`. Random tests draw the same examples each time; `pytest --hypothesis-profile=explore`
draws others.
"""

import importlib.util
import logging
import os
import sys
import sysconfig
import warnings
from pathlib import Path

import hypothesis
import pytest
import torch  # before _C: both then share torch's OpenMP runtime

if folder := os.environ.get("FASTFFN_TEST_MODULE"):
    path = Path(folder) / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("fastffn._C", path)
    sys.modules["fastffn._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["fastffn._C"])

from fastffn.ops import backend

# The benches as the package that `python -m bench` sees; the repository's root is not on sys.path.
folder = Path(__file__).resolve().parent.parent / "bench"
spec = importlib.util.spec_from_file_location(
    "bench", folder / "__init__.py", submodule_search_locations=[str(folder)]
)
sys.modules["bench"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["bench"])

hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.register_profile("explore")
hypothesis.settings.load_profile("fixed")


def pytest_collection_modifyitems(items):
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device"
    if not os.environ.get("FASTFFN_DATA"):
        reasons["data"] = "needs the data sets: set FASTFFN_DATA to their folder"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def poisoned():
    """Memory that torch.empty returns is full of NaN, so that what an op forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def isa_by_name():
    """Selects an instruction set of csrc for the test."""
    module = backend.cpp()[0]
    before = module.isa()
    yield module.select_isa
    module.select_isa(before)


@pytest.fixture(params=["avx512", "avx2", "baseline", "reference"])
def served_by(request, monkeypatch):
    """Each instruction set of csrc in turn that runs here, and the fallback."""
    name, module = request.param, backend.cpp()[0]
    if name == "reference":
        monkeypatch.setattr(backend, "cpp", lambda: (None, "test"))
    elif module is None or name not in module.available_isas():
        pytest.skip(f"csrc does not run on {name} here")
    else:
        request.getfixturevalue("isa_by_name")(name)
    return name


@pytest.fixture
def loud_again(monkeypatch):
    """`quiet` changes the whole process; the next test gets it as it was."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with warnings.catch_warnings():
        yield
    logging.disable(logging.NOTSET)
