"""Objectives and training: what is minimised, what stays as it was, what survives a kill."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_teacher import save_teacher, write_text

from fastffn.data.text import read_documents
from fastffn.distill.batches import LengthSampler
from fastffn.distill.cache import TeacherCache
from fastffn.distill.checkpoints import last_checkpoint
from fastffn.distill.objective import Objective
from fastffn.distill.teacher import load_teacher
from fastffn.distill.trainer import distil
from fastffn.distill.vectors import encode
from fastffn.errors import UserError
from fastffn.models import from_teacher, supernet_from_teacher

GENE = "1x1 down(gelu(up(x)))"
STEPS = 12


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(save_teacher(tmp_path_factory.mktemp("teacher") / "bert"))


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    documents = read_documents([write_text(folder / "text.txt")])
    sentences = [sentence for document in documents for sentence in document.sentences]
    return TeacherCache.open_or_compute(folder / "c", teacher, sentences, hidden_layers=range(5))


@pytest.fixture
def student(teacher):
    return new_student(teacher)


def new_student(teacher, layers=(0, 3), gene=GENE):
    return from_teacher(
        teacher.model, gene, layers, hidden_dropout_prob=0, attention_probs_dropout_prob=0
    )


def objective(**changes):
    return dataclasses.replace(Objective(((0, 0), (1, 1), (2, 4)), relation_heads=12), **changes)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def changed(first, second):
    return {name for name in first if not torch.equal(first[name], second[name])}


# -- the objective -------------------------------------------------------------------------------


def test_the_teacher_itself_has_no_loss(teacher, cache):
    whole = from_teacher(teacher.model, "1x4 down(gelu_erf(up(x)))", range(4))
    full = objective(layer_map=tuple((k, k) for k in range(5)))
    losses = full.losses(whole, cache.batch(range(20)))
    assert set(losses) == {"total", "hidden", "relations", "vector"}
    assert all(abs(value) < 1e-4 for value in losses.values())


def test_total_is_the_weighted_sum(student, cache):
    batch = cache.batch(range(16))
    parts = objective().losses(student, batch)
    weighted = objective(hidden=2.0, relations=0.5, vector=3.0)
    expected = 2 * parts["hidden"] + 0.5 * parts["relations"] + 3 * parts["vector"]
    torch.testing.assert_close(weighted.losses(student, batch)["total"], expected)


def test_what_weighs_nothing_is_neither_read_nor_computed(student, cache):
    only = objective(hidden=0, relations=0)
    assert only.outputs == ("vector",)
    losses = only.losses(student, cache.batch(range(8), only.outputs))
    assert set(losses) == {"total", "vector"}


def test_layers_weigh_alike_whatever_their_scale(student, cache):
    """The hidden loss is the share of variance that the student misses."""
    batch = cache.batch(range(16))
    alone = objective(layer_map=((2, 4),), relations=0, vector=0)
    real = batch["attention_mask"].bool()
    theirs = batch["teacher_hidden_4"][real]
    ours = student(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state[real]
    expected = ((ours - theirs) ** 2).sum() / ((theirs - theirs.mean(0)) ** 2).sum()
    torch.testing.assert_close(alone.losses(student, batch)["hidden"], expected)


def test_bad_objectives():
    with pytest.raises(UserError, match="must not be negative"):
        objective(hidden=-1)
    with pytest.raises(UserError, match="must not be negative nor all 0"):
        objective(hidden=0, relations=0, vector=0)
    with pytest.raises(UserError, match="layer map"):
        objective(layer_map=())


# -- training ------------------------------------------------------------------------------------


def test_losses_fall_and_the_student_comes_closer(student, cache):
    before = encode(student, cache, range(len(cache)))
    result = distil(student, cache, objective(), 60, batch_size=16, learning_rate=3e-3)
    first, last = result.curve[0], result.curve[-1]
    assert last[0] == 60 and last[1] < 0.7 * first[1]
    assert all(last[2][part] < first[2][part] for part in first[2])
    assert set(first[2]) == {"hidden", "relations", "vector"}
    after, truth = encode(student, cache, range(len(cache))), cache.vectors(range(len(cache)))
    assert (after * truth).sum(-1).mean() > (before * truth).sum(-1).mean()
    assert not student.training and result.frozen == [] and result.seconds > 0


def test_unreached_parameters_are_frozen_and_named(student, cache):
    before = weights(student)
    attention_only = objective(hidden=0, vector=0)
    result = distil(student, cache, attention_only, 2, batch_size=8, weight_decay=0.1)
    # Relations of the last layer's queries, keys and values see nothing that comes after them.
    last = "encoder.layer.1."
    expected = {
        name
        for name in before
        if name.startswith(last) and not any(f".{x}." in name for x in ("query", "key", "value"))
    }
    assert set(result.frozen) == expected
    assert changed(before, student.state_dict()) == set(before) - expected
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_chosen_parameters_are_frozen(student, cache):
    before = weights(student)
    distil(student, cache, objective(), 2, batch_size=8, freeze=("embeddings.",))
    assert not any(n.startswith("embeddings.") for n in changed(before, student.state_dict()))
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_only_the_given_sentences_are_read(student, cache, monkeypatch):
    seen = []
    batch = TeacherCache.batch
    monkeypatch.setattr(
        TeacherCache, "batch", lambda self, k, *a: seen.extend(k) or batch(self, k, *a)
    )
    numbers = np.arange(30, 62)
    distil(student, cache, objective(), 8, numbers=numbers, batch_size=8)
    assert set(seen) == set(numbers.tolist())


def test_the_supernet_runs_what_it_is_told(teacher, cache):
    supernet = supernet_from_teacher(teacher.model, 2, 24, (0, 3), hidden_dropout_prob=0)
    asked = []

    def genes(step):
        asked.append(step)
        return [f"{1 + step % 2}x1/2 down(gelu(up(x)))"] * 2

    before = weights(supernet)
    distil(supernet, cache, objective(), 4, batch_size=8, genes=genes)
    assert asked == [0, 1, 2, 3]
    moved = changed(before, supernet.state_dict())
    assert "encoder.layer.0.ffn.units.1.up.weight" in moved
    beyond = {k: v[12:] for k, v in before.items() if k.endswith("up.weight")}
    after = {k: v[12:] for k, v in supernet.state_dict().items() if k.endswith("up.weight")}
    assert same(beyond, after)  # columns that no gene used


def test_equal_seeds_give_equal_students(teacher, cache):
    results = []
    for seed in (0, 0, 1):
        student = new_student(teacher)
        distil(student, cache, objective(), 4, batch_size=8, seed=seed)
        results.append(weights(student))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_bad_calls(student, cache, teacher, tmp_path):
    with pytest.raises(UserError, match="at least one step"):
        distil(student, cache, objective(), 0)
    with pytest.raises(UserError, match="at least one step and one sentence"):
        distil(student, cache, objective(), 1, numbers=[])
    few = TeacherCache.open_or_compute(
        tmp_path, teacher, ["bara", "doti"], hidden_layers=[0], relation_layer=None
    )
    with pytest.raises(UserError, match=r"lack \['hidden_1', 'hidden_4', 'k', 'q', 'v'\]"):
        distil(student, few, objective(), 1)


# -- interruption --------------------------------------------------------------------------------


def interrupted(student, cache, folder, step, **options):
    """Trains until `step`, with a checkpoint after every step, and is then interrupted."""

    def progress(done, total):
        if done == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil(
            student,
            cache,
            objective(),
            STEPS,
            batch_size=64,
            output_dir=folder,
            checkpoint_seconds=0,
            progress=progress,
            **options,
        )


def resumed(student, cache, folder, **options):
    return distil(student, cache, objective(), STEPS, batch_size=64, output_dir=folder, **options)


@pytest.fixture(scope="module")
def uninterrupted(teacher, cache):
    student = new_student(teacher)
    result = distil(student, cache, objective(), STEPS, batch_size=64)
    return weights(student), result


@pytest.mark.parametrize("step", [3, 8])  # an epoch has five steps
def test_a_resumed_run_ends_with_the_same_weights(teacher, cache, tmp_path, uninterrupted, step):
    interrupted(new_student(teacher), cache, tmp_path, step)
    assert last_checkpoint(tmp_path).name == f"checkpoint-{step - 1}"
    student = new_student(teacher)
    result = resumed(student, cache, tmp_path)
    expected, whole = uninterrupted
    assert same(expected, student.state_dict())
    assert [point[0] for point in result.curve] == [point[0] for point in whole.curve]
    assert result.curve == whole.curve


def test_a_checkpoint_that_was_cut_short_does_not_count(teacher, cache, tmp_path, uninterrupted):
    interrupted(new_student(teacher), cache, tmp_path, 6)
    newest = last_checkpoint(tmp_path)
    state = newest / "trainer_state.json"
    state.write_text(state.read_text(encoding="utf-8")[:100], encoding="utf-8")
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    student = new_student(teacher)
    resumed(student, cache, tmp_path)
    assert same(uninterrupted[0], student.state_dict())


def test_starting_over_removes_old_checkpoints(teacher, cache, tmp_path, uninterrupted):
    interrupted(new_student(teacher), cache, tmp_path, 4)
    student = new_student(teacher)
    resumed(student, cache, tmp_path, resume=False)
    assert same(uninterrupted[0], student.state_dict())
    assert last_checkpoint(tmp_path) is None


def test_checkpoints_hold_no_pickled_arguments(teacher, cache, tmp_path):
    interrupted(new_student(teacher), cache, tmp_path, 5)
    names = {path.name for path in tmp_path.rglob("*")}
    assert {"checkpoint-3", "checkpoint-4", "model.safetensors", "optimizer.pt"} <= names
    assert "checkpoint-2" not in names and "training_args.bin" not in names


def test_an_order_of_batches_depends_on_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(3, 40, 100)
    first, second = (LengthSampler(lengths, 8, seed=3) for _ in range(2))
    for sampler in (first, second):
        sampler.set_epoch(2)
    torch.manual_seed(5)
    once = list(first)
    assert once == list(second) and sorted(once) == list(range(100))
    second.set_epoch(3)
    assert once != list(second)
