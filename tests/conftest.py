"""What every test relies on: marked tests are skipped, with the reason, where they cannot run."""

import os

import pytest
import torch


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
