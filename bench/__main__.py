"""Reads benchmark results, which `make bench` makes; runs the ones for a GPU."""

import argparse
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fastffn.errors import UserError

from .report import load, picture, save, table


def run_on_gpu(only: str | None) -> dict:
    """The result of all benchmarks on a CUDA device.

    A case that fails is named in pytest's output and left out; the others count.

    Raises:
        UserError: there is no device, or no case ended well.
    """
    if not torch.cuda.is_available():
        raise UserError("no CUDA device here: torch finds none; run this where there is one")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        here = str(Path(__file__).parent)
        options = ["-q", "--benchmark-columns=median", f"--benchmark-json={file}"]
        pytest.main([here, "-m", "gpu", *options, *(["-k", only] if only else [])])
        if not file.is_file() or not file.stat().st_size:
            raise UserError("no benchmark ended well; the reasons are above")
        return load([file])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="print the table of one or several runs")
    report.add_argument("file", nargs="+", help="written by pytest --benchmark-json, or by --save")
    report.add_argument("--save", metavar="FILE.json", help="write the compact result too")
    report.add_argument("--picture", metavar="FILE.png", help="draw the ratios too")
    gpu = commands.add_parser("gpu", help="run every benchmark that has a CUDA case")
    gpu.add_argument("--out", metavar="FILE.json", required=True, help="the compact result")
    gpu.add_argument("--picture", metavar="FILE.png", help="draw the ratios too")
    gpu.add_argument("--only", metavar="WORDS", help="as pytest -k, e.g. 'ffn and training'")
    arguments = parser.parse_args()
    try:
        if arguments.command == "gpu":
            result = run_on_gpu(arguments.only)
            save(result, arguments.out)
        else:
            result = load(arguments.file)
            if arguments.save:
                save(result, arguments.save)
        print(table(result))
        if arguments.picture:
            picture(result, arguments.picture)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
