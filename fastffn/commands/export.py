"""`fastffn export`: a model in the format that its users run.

fastffn export MODEL --out DIR [--format onnx] [--int8] [--pooling mean] [--normalize]
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastffn.errors import UserError

FORMATS = ("safetensors", "onnx", "torch-export", "sentence-transformers")


def add(commands: Any, add_command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the command; `add_command` is `fastffn.cli`'s way to add one."""
    text = "write a model in another format, checked: ONNX, torch.export, sentence-transformers"
    command = add_command(commands, "export", _export, text)
    add = command.add_argument
    add("model", metavar="MODEL", help="a folder or hub name of an encoder, with a head or without")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    add("--format", choices=FORMATS, default="onnx", help="(default: %(default)s)")
    add("--int8", action="store_true", help="of onnx: products in int8, a quarter of the size")
    add(
        "--pooling",
        choices=("mean", "cls"),
        help="of an encoder without a head: how it makes sentence vectors (default: as its folder "
        "says)",
    )
    add(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="sentence vectors of length 1 (default: as the model's folder says)",
    )


def _export(arguments: argparse.Namespace) -> int:
    if arguments.int8 and arguments.format != "onnx":
        raise UserError("--int8 is of --format onnx")
    if not arguments.debug:
        from fastffn.quiet import quiet

        quiet()
    from fastffn.serve.export import export
    from fastffn.serve.manifest import Manifest

    out = export(
        arguments.model,
        arguments.out,
        arguments.format,
        quantize="int8" if arguments.int8 else None,
        pooling=arguments.pooling,
        normalize=arguments.normalize,
    )
    print("\n".join(summary(Manifest.read(out), out)))
    return 0


def summary(manifest: Any, out: Path) -> list[str]:
    """What was written, in lines."""
    size, checked, interface = sum(manifest.files.values()), manifest.checked, manifest.interface
    opset = f", opset {checked['opset']}" if "opset" in checked else ""
    lines = [
        f"{out}: {manifest.format}{opset}, {size / 1e6:.1f} MB",
        f"  {', '.join(interface.inputs)} -> {', '.join(interface.outputs)}",
    ]
    if "difference" in checked:
        lines.append(
            f"  checked: its outputs differ from the model's by {checked['difference']:.1e}"
        )
    if "int8" in checked:
        lines.append(f"  {_int8(checked['int8'])}")
    if checked.get("needs"):
        lines.append(f"  before SentenceTransformer({str(out)!r}): {checked['needs']}")
    return lines


def _int8(found: Mapping[str, float]) -> str:
    same = f", the same class in {found['agreement']:.1%}" if "agreement" in found else ""
    return (
        f"then int8 against float32, on random tokens: cosine {found['cosine']:.4f}{same}; "
        "fastffn evaluate says more"
    )
