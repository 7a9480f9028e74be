"""What every test relies on: marked tests are skipped, with the reason, where they cannot run.

FASTFFN_TEST_MODULE names a folder whose `_C` is tested instead of the installed one: see `make
sanitize`.
"""

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

import pytest
import torch  # before _C: both then share torch's OpenMP runtime

if folder := os.environ.get("FASTFFN_TEST_MODULE"):
    path = Path(folder) / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("fastffn._C", path)
    sys.modules["fastffn._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["fastffn._C"])


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
