"""Programs as Triton source, and the files it is kept in."""

import ast
import os
import stat
from pathlib import Path

import pytest

from fastffn.expr import PRIMITIVES, Expr, backward_program, forward_program
from fastffn.kernels import codegen


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFFN_CACHE", str(tmp_path))
    codegen.load.cache_clear()
    return tmp_path / "triton"


def test_one_line_per_instruction():
    program = forward_program(Expr.parse("mul(swish(a), b)"))
    assert codegen.instruction_lines(program) == [
        "r2 = sigmoid(r0)",
        "r3 = r0 * r2",
        "r4 = r3 * r1",
    ]
    assert codegen.function_text(program).splitlines()[:2] == [
        "@triton.jit",
        "def program(r0, r1):",
    ]


def test_constants_are_literals():
    lines = codegen.instruction_lines(forward_program(Expr.parse("leaky_relu(a)")))
    assert lines == ["r1 = where(r0 > 0.0, r0, 0.01 * r0)"]


@pytest.mark.parametrize("name", PRIMITIVES)
def test_every_formula_reads_known_names_only(name):
    """A function that the table uses and kernels/math.py lacks would fail at a launch only."""
    expr = Expr.call(name, *map(Expr.leaf, "ab"[: PRIMITIVES[name].arity]))
    imported = ast.parse(codegen.PREAMBLE).body[-1]
    known = {alias.name for alias in imported.names} | {"triton"}
    for program in (forward_program(expr), backward_program(expr)):
        tree = ast.parse(codegen.function_text(program))
        reads = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        registers = {f"r{i}" for i in range(program.registers)}
        assert reads <= known | registers


def test_inputs_without_influence_are_not_read():
    assert codegen.live_inputs(backward_program(Expr.parse("add(a, b)"))) == (0,)
    assert codegen.live_inputs(backward_program(Expr.parse("mul(a, b)"))) == (0, 1, 2)
    assert codegen.live_inputs(backward_program(Expr.parse("tanh(a)"))) == (0, 1)
    assert codegen.live_inputs(backward_program(Expr.parse("mul(a, b)"), ("a",))) == (0, 2)


def test_modules_are_files_named_by_content(cache):
    first = codegen.load("answer", "value = 1\n")
    second = codegen.load("answer", "value = 2\n")
    assert (first.value, second.value) == (1, 2)
    assert first.__name__ != second.__name__
    assert codegen.load("answer", "value = 1\n") is first
    files = sorted(cache.glob("answer_*.py"))
    assert len(files) == 2
    assert {file.read_text() for file in files} == {"value = 1\n", "value = 2\n"}


def test_a_damaged_file_is_replaced(cache):
    codegen.load("answer", "value = 1\n")
    (file,) = cache.glob("*.py")
    file.write_text("value = ")
    codegen.load.cache_clear()
    assert codegen.load("answer", "value = 1\n").value == 1
    assert file.read_text() == "value = 1\n"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """A read-only home, as in many containers, costs the shared file and nothing else."""
    obstacle = tmp_path / "file"
    obstacle.write_text("in the way of a folder")
    monkeypatch.setenv("FASTFFN_CACHE", str(obstacle))
    codegen.load.cache_clear()
    module = codegen.load("answer", "value = 3\n")
    assert module.value == 3
    assert Path(module.__spec__.origin).is_file()
    assert stat.S_IMODE(os.stat(Path(module.__spec__.origin).parent).st_mode) == 0o700


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTFFN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert codegen.cache_folder() == tmp_path / "fastffn" / "triton"
    monkeypatch.setenv("FASTFFN_CACHE", str(tmp_path / "elsewhere"))
    assert codegen.cache_folder() == tmp_path / "elsewhere" / "triton"
