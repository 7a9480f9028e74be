"""BERT-of-Theseus and fine-tuning through the engine: what is exported, for every kind of task."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_recipes import NO_DROPOUT, Files, on_task, same, shortened, student, task_values, theseus

from fastffn import EfficientBertForQuestionAnswering
from fastffn.distill import run
from fastffn.distill.preparation import prepare
from fastffn.distill.recipe import read
from fastffn.distill.replacing import Replacing, Schedule

HEADS = {
    "classification": "SequenceClassification",
    "regression": "SequenceClassification",
    "qa": "QuestionAnswering",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("tiny") / "files")


@pytest.fixture(scope="module")
def tuned(files, tmp_path_factory):
    """For each kind of task a teacher that `finetune` has made."""
    folder = tmp_path_factory.mktemp("tuned")
    for kind in HEADS:
        finetuned(files, files.teacher, kind, folder / kind)
    return {kind: folder / kind / "student" for kind in HEADS}


def finetuned(files, model, kind, out):
    values = {"student.load": model, "stages.task.learning_rate": 1e-3} | task_values(files, kind)
    return run(read("finetune", shortened(values, "task")), out)


@pytest.mark.parametrize("kind", HEADS)
def test_the_student_is_a_plain_model_of_its_predecessors_class(kind, files, tuned, tmp_path):
    report = run(theseus(files, kind=kind, teacher=tuned[kind]), tmp_path / "run")
    auto = getattr(transformers, f"AutoModelFor{HEADS[kind]}")
    teacher, model = (
        auto.from_pretrained(path) for path in (tuned[kind], tmp_path / "run/student")
    )
    assert type(model) is type(teacher)
    assert model.config.num_hidden_layers == 2
    assert model.config.id2label == teacher.config.id2label
    saved, theirs = student(tmp_path / "run"), teacher.state_dict()
    assert same(saved, model.state_dict())  # nothing more, nothing less
    trained = [name for name in saved if not torch.equal(saved[name], theirs[name])]
    assert trained and all(".encoder.layer." in name for name in trained)
    frozen = [name for name in saved if name not in trained]
    assert all(".encoder.layer." not in name for name in frozen)  # embeddings and head
    (score,) = report["metrics"].values()
    assert score and all(0 <= value <= 1 or kind == "regression" for value in score.values())


@pytest.mark.parametrize("kind", HEADS)
def test_finetuning_starts_from_the_model_and_trains_all_of_it(kind, files, tuned):
    before = load_file(files.teacher / "model.safetensors")
    after = load_file(tuned[kind] / "model.safetensors")
    for name, tensor in before.items():
        if not name.startswith("pooler."):  # a head for questions has none
            assert 0 < (after[f"bert.{name}"] - tensor).abs().max() < 0.1


def test_efficientbert_answers_questions(files, tuned, tmp_path):
    """Made from a BERT, fine-tuned, and the predecessor of a smaller one."""
    small = {"from": "teacher", "layers": 4, "genes": ["1x1 down(gelu(up(x)))"] * 4}
    made = on_task(
        files,
        {"soft_labels": {}, "hidden": {}},
        models={"teacher": str(tuned["qa"]), "student": {"efficientbert": small}},
        kind="qa",
    )
    report = run(made, tmp_path / "made")
    assert {*report["metrics"]["student"]} == {"f1"}
    report = finetuned(files, tmp_path / "made" / "student", "qa", tmp_path / "tuned")
    assert {*report["metrics"]["student"]} == {"f1"}
    teacher = tmp_path / "tuned" / "student"
    run(theseus(files, kind="qa", teacher=teacher), tmp_path / "run")
    model = EfficientBertForQuestionAnswering.from_pretrained(tmp_path / "run" / "student")
    assert model.config.num_hidden_layers == 2 and len(model.config.genes) == 2
    theirs = load_file(teacher / "model.safetensors")
    for name, tensor in student(tmp_path / "run").items():
        assert torch.equal(tensor, theirs[name]) == (".encoder.layer." not in name), name


# -- what is drawn -------------------------------------------------------------------------------


def test_draws_are_a_function_of_seed_and_step(files):
    made = prepare(theseus(files))

    def drawn(seed, steps=range(200), rate=0.5):
        schedule = Schedule("constant", rate=rate, steps=1000)
        replacing = Replacing(made.models["student"], made.models["teacher"], schedule, 2000, seed)
        return {step: replacing.drawn(step) for step in steps}

    first = drawn(1)
    torch.manual_seed(5)  # no generator of others matters
    assert drawn(1, range(100, 200)) == {step: first[step] for step in range(100, 200)}
    assert drawn(2) != first
    shares = torch.tensor([*drawn(1, range(1000), 0.3).values()]).double().mean(0)
    assert ((shares - 0.3).abs() < 4 * (0.3 * 0.7 / 1000) ** 0.5).all()
    assert {tuple(draw) for draw in first.values()} == {(a, b) for a in (0, 1) for b in (0, 1)}


def test_the_schedule_reaches_one_and_is_the_same_after_resuming(files):
    linear = Schedule("linear", base=0.3)
    assert [round(linear.probability(step, 10), 3) for step in (0, 5, 9, 10, 11)] == [
        0.3,
        0.65,
        0.93,
        1,
        1,
    ]
    constant = Schedule("constant", rate=0.5, steps=4)
    assert [constant.probability(step, 10) for step in (0, 3, 4, 9)] == [0.5, 0.5, 1, 1]


def test_the_student_alone_is_trained_once_all_layers_are_its_own(files, tmp_path):
    """With probability 1 throughout, replacing is fine-tuning."""
    losses = {"hard_labels": {}}
    teacher = files.with_head("SequenceClassification", **NO_DROPOUT)
    models = {"teacher": str(teacher), "student": {"layers_of": "teacher", "layers": 2}}
    always = {"schedule": "constant", "rate": 1.0}
    run(on_task(files, losses, models=models, replacing=always), tmp_path / "always")
    run(on_task(files, losses, models=models, teacher=None), tmp_path / "plain")
    assert same(student(tmp_path / "always"), student(tmp_path / "plain"))
    never = {"schedule": "constant", "rate": 0.0}
    options = {"replacing": never, "train": ["layers"], "weight_decay": 0.0}
    made = on_task(files, losses, models=models, **options)
    report = run(made, tmp_path / "never")
    assert same(student(tmp_path / "never"), prepare(made).models["student"].state_dict())
    assert report["stages"]["task"]["frozen"] == []


def test_pieces_of_a_batch_are_mixed_alike(files, tmp_path):
    teacher = files.with_head("SequenceClassification", **NO_DROPOUT)
    models = {"teacher": str(teacher), "student": {"layers_of": "teacher", "layers": 2}}
    options = {"models": models, "train": ["layers"], "replacing": {"rate": 0.5}, "eps": 1e-4}
    for pieces in (1, 2):
        made = on_task(files, {"hard_labels": {}}, accumulate=pieces, **options)
        run(made, tmp_path / str(pieces))
    for name, tensor in student(tmp_path / "1").items():
        torch.testing.assert_close(student(tmp_path / "2")[name], tensor, rtol=1e-4, atol=1e-5)
