"""Reads benchmark results; `make bench` makes them."""

import argparse
import sys

from fastffn.errors import UserError

from .report import load, picture, save, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="print the table of one or several runs")
    report.add_argument("file", nargs="+", help="written by pytest --benchmark-json, or by --save")
    report.add_argument("--save", metavar="FILE.json", help="write the compact result too")
    report.add_argument("--picture", metavar="FILE.png", help="draw the ratios too")
    arguments = parser.parse_args()
    try:
        result = load(arguments.file)
        print(table(result))
        if arguments.save:
            save(result, arguments.save)
        if arguments.picture:
            picture(result, arguments.picture)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
