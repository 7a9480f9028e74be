"""`python -m bench report FILE.json`: the table of a result file."""

import argparse
import sys

from fastffn.errors import UserError

from .report import load, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="print the table of a pytest-benchmark result file")
    report.add_argument("file", help="written by pytest --benchmark-json")
    arguments = parser.parse_args()
    try:
        print(table(load(arguments.file)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
