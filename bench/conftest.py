"""Conditions of the machine that go into every result file."""

import importlib.metadata
import platform

import pytest
import torch


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # a host's name is nobody's business
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine_info["versions"] = versions
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
