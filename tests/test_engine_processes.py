"""Two processes (gloo) do what one does with the same batch, but for rounding."""

import json

import pytest
import torch
from tiny_recipes import ALL_LOSSES, NO_DROPOUT, Files, on_task, said, spawn, student


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("tiny") / "files")


def outcomes(recipes, folder):
    """Curves and weights of one process and of two."""
    found = []
    for processes, recipe in recipes.items():
        out = folder / str(processes)
        assert spawn(recipe, out, processes=processes) == 0, said(out)
        report = json.loads((out / "report.json").read_text())
        assert report["processes"] == processes
        curves = [
            [point[1], *(point[2][name] for name in sorted(point[2]))]
            for stage in report["stages"].values()
            for point in stage["curve"]
        ]
        found.append((torch.tensor(curves), student(out)))
    return found


def assert_equal(one, two):
    torch.testing.assert_close(one[0], two[0], rtol=1e-5, atol=1e-5)
    for name, tensor in one[1].items():
        torch.testing.assert_close(two[1][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pieces", [1, 2])
def test_all_losses(pieces, files, tmp_path):
    """Means over examples, tokens, pairs and squares, of ragged lengths."""
    recipe = on_task(files, ALL_LOSSES, accumulate=pieces, eps=1e-4)
    assert_equal(*outcomes({1: recipe, 2: recipe}, tmp_path))


def test_theseus_draws_the_same_in_all_processes(files, tmp_path):
    teacher = files.with_head("SequenceClassification", **NO_DROPOUT)
    models = {"teacher": str(teacher), "student": {"layers_of": "teacher", "layers": 2}}
    options = {"replacing": {"schedule": "constant", "rate": 0.5}, "train": ["layers"]}
    made = on_task(files, {"hard_labels": {}}, models=models, eps=1e-4, **options)
    assert_equal(*outcomes({1: made, 2: made}, tmp_path))


def test_a_supernet_and_a_cache_of_outputs(files, tmp_path):
    supernet = {"from": "teacher", "layers": [1, 3], "max_stack": 2, "max_width": 24}
    supernet |= {"genes": ["2x1 down(gelu(up(x)))"] * 2, **NO_DROPOUT}
    made = on_task(
        files,
        {"scores": {"masked": "zero"}, "hidden": {}},
        models={"student": {"supernet": supernet}},
        subnetworks=3,
        cache=True,
        eps=1e-4,
    )
    assert_equal(*outcomes({1: made, 2: made}, tmp_path))


def test_fewer_examples_than_a_batch_are_refused(files, tmp_path):
    """Some would be taken twice."""
    made = on_task(files, {"hard_labels": {}}, batch_size=64)
    assert spawn(made, tmp_path / "run", processes=2) == 2
    assert "batch_size 64 is more than the 30 rows of task" in said(tmp_path / "run")


def test_a_batch_that_does_not_divide_is_refused(files, tmp_path):
    made = on_task(files, {"hard_labels": {}}, batch_size=7)
    assert spawn(made, tmp_path / "run", processes=2) == 2
    assert "batch_size 7 does not divide into 2 processes x 1 pieces" in said(tmp_path / "run")
