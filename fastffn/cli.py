"""The command line: `fastffn demo | distill | finetune | search | evaluate | export | bench | ...`.

What goes wrong, and how it ends:
    bad input (UserError)       one line, status 2; an ExprError shows its character in two more
    an absent extra             one line with the remedy, status 2
    a file that cannot be used  one line, status 2
    Ctrl-C, SIGTERM             one line that says how to resume, status 130
    a closed pipe               nothing, status 141
    anything else               a defect: traceback and where to report it, status 1
`--debug` shows the traceback of all of them and what other libraries say.

Everything heavy is imported by the command that needs it: `--help` waits for nothing.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path

import fastffn
from fastffn.commands import bench, distill, evaluate, export, search
from fastffn.errors import ExprError, UserError

_BAD_INPUT, _DEFECT, _INTERRUPTED, _CLOSED_PIPE = 2, 1, 130, 141
# Module: the extra that brings it. What is not here is a defect when it is absent.
_EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "huggingface_hub": "models",
    "matplotlib": "search",
    "numpy": "train",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "optuna": "search",
    "psycopg": "postgresql",
    "rich": "train",
    "safetensors": "models",
    "scipy": "train",
    "sklearn": "train",
    "sqlalchemy": "search",
    "tensorboard": "train",
    "tokenizers": "models",
    "transformers": "models",
    "yaml": "train",
}
_DEMO_NEEDS = ("accelerate", "datasets", "matplotlib", "optuna", "rich", "scipy", "sklearn")
_DEMO_NEEDS += ("safetensors", "transformers")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str):
        self.exit(_BAD_INPUT, f"error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        The exit status.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(_joined(sys.argv[1:] if argv is None else argv))
    # argparse takes a list of words from one place only: key=value may stand after options too.
    words = [word for word in rest if not word.startswith("-") and "=" in word]
    if words == rest and hasattr(arguments, "overrides"):
        arguments.overrides = [*arguments.overrides, *words]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _guarded(arguments)


def _joined(argv: Sequence[str]) -> list[str]:
    """The arguments, with a command of two words as one."""
    name = " ".join(argv[:2])
    return [name, *argv[2:]] if name in (*bench.TWO_WORDS, *search.TWO_WORDS) else list(argv)


def _guarded(arguments: argparse.Namespace) -> int:
    """Runs the command and turns what it raises into a status."""
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()  # a closed pipe shows here rather than at exit
        return status
    except KeyboardInterrupt:
        _show_traceback(arguments.debug)
        return _say(f"interrupted{arguments.resume(arguments)}", _INTERRUPTED)
    except BrokenPipeError:
        # What is still buffered must not fail again while Python shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except ImportError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            return _defect()
        _show_traceback(arguments.debug)
        return _say(f"error: {_absent([error.name], extra)}", _BAD_INPUT)
    except (UserError, OSError) as error:
        text = _one_line(error)
        if text is None:
            return _defect()
        _show_traceback(arguments.debug)
        return _say(f"error: {text}", _BAD_INPUT)
    except Exception:
        return _defect()
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(*_) -> None:
    """SIGTERM as Ctrl-C: schedulers send it, and a run should close its files all the same."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise KeyboardInterrupt


def _say(text: str, status: int) -> int:
    print(text, file=sys.stderr, flush=True)
    return status


def _one_line(error: Exception) -> str | None:
    """The message for people; None for an OSError that no file of theirs caused."""
    if isinstance(error, ExprError):
        return str(error)
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if error.filename is None and error.errno is None:
        return None
    what = f"{error.filename}: " if error.filename is not None else ""
    return f"{what}{error.strerror}"


def _show_traceback(debug: bool) -> None:
    if debug:
        sys.excepthook(*sys.exc_info())


def _defect() -> int:
    sys.excepthook(*sys.exc_info())
    return _say(
        "This is a defect of fastffn: please report it with the lines above and what "
        "`fastffn doctor` prints.",
        _DEFECT,
    )


def _absent(modules: Sequence[str], extra: str) -> str:
    are = "is" if len(modules) == 1 else "are"
    return f'{", ".join(modules)} {are} not installed: pip install "fastffn[{extra}]"'


# -- the commands --------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    absent = [module for module in _DEMO_NEEDS if util.find_spec(module) is None]
    if absent:
        raise UserError(_absent(absent, "demo"))
    if not arguments.debug:
        from fastffn.quiet import quiet

        quiet()
    from fastffn.compress import pipeline, report
    from fastffn.compress.options import Options
    from fastffn.progress import Progress

    options = Options(
        teacher=arguments.teacher,
        text=arguments.text,
        budget_params=arguments.budget_params,
        layers=arguments.layers,
        embedding_size=arguments.embedding_size,
        minutes=arguments.minutes,
        out=arguments.out,
        seed=arguments.seed,
        ablate=arguments.ablate,
        fresh=arguments.fresh,
        keep_cache=arguments.keep_cache,
    )
    with Progress() as progress:
        found = pipeline.run(options, progress)
    report.terminal(found, report.write(found, options.out))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from fastffn import doctor

    doctor.print_report()
    return 0


# -- the arguments -------------------------------------------------------------------------------


def _count(text: str) -> int:
    """`2400000`, `2.4M`, `800k`."""
    factor = {"k": 1e3, "m": 1e6, "g": 1e9}.get(text[-1:].lower())
    try:
        return int(text) if factor is None else round(float(text[:-1]) * factor)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no count such as 2400000 or 2.4M") from None


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 0,2,5") from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastffn", description="Makes BERT-like encoders small and fast.")
    parser.add_argument("--version", action="version", version=f"fastffn {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    distill.add(commands, _add)
    search.add(commands, _add)
    evaluate.add(commands, _add)
    export.add(commands, _add)
    bench.add(commands, _add)
    _add(commands, "doctor", _doctor, "say what runs where, and why something does not")
    return parser


def _add(commands, name: str, run, text: str, resume=lambda arguments: "") -> _Parser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.add_argument("--debug", action="store_true", help="show tracebacks and all warnings")
    command.set_defaults(run=run, resume=resume)
    return command


def _resume_demo(arguments: argparse.Namespace) -> str:
    if not (arguments.out / "state.json").exists():
        return " before anything was done; run the same command again"
    return f": {arguments.out} keeps what is done; run the same command again to resume"


def _add_demo(commands) -> None:
    text = "compress an encoder: search its FFN, distil it, report size, speed and what is retained"
    demo = _add(commands, "demo", _demo, text, _resume_demo)
    add = demo.add_argument
    add(
        "--teacher",
        metavar="DIR_OR_HUB_NAME",
        help="a BERT-like encoder in safetensors (default: all-MiniLM-L6-v2)",
    )
    add(
        "--text",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="UTF-8 text, plain, .gz or .xz (default: the standard library's documentation)",
    )
    add(
        "--budget-params",
        type=_count,
        metavar="N",
        help="most parameters of the student, word embeddings apart, such as 2.4M",
    )
    add(
        "--embedding-size",
        type=_count,
        metavar="N",
        help="factorise the word embeddings to this width (default: the teacher's own)",
    )
    add(
        "--layers",
        type=_layers,
        metavar="0,2,5",
        help="layers of the teacher that the student starts from, counted from 0",
    )
    add(
        "--minutes",
        type=float,
        default=9.0,
        metavar="M",
        help="time for everything (default: %(default)g)",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="run directory; an interrupted run resumes from it (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="S", help="(default: %(default)s)")
    add(
        "--ablate",
        action="store_true",
        help="distil each baseline as long as the student; takes about four times the time",
    )
    add("--fresh", action="store_true", help="forget what an earlier run left in DIR")
    add("--keep-cache", action="store_true", help="keep the teacher's outputs in DIR at the end")


def _version() -> str:
    try:
        return metadata.version("fastffn")
    except metadata.PackageNotFoundError:
        return fastffn.__version__


if __name__ == "__main__":
    sys.exit(main())
