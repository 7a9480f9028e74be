"""What does not fit is told in one line, before anything is trained."""

import copy
import functools
import json
import operator

import pytest
import transformers
from tiny_recipes import (
    HALF,
    Files,
    Stopped,
    on_task,
    recipe,
    same,
    stop_at,
    student,
    task_values,
    theseus,
    two_stages,
)

from fastffn.cli import main
from fastffn.distill import run
from fastffn.distill.recipe import Recipe, read
from fastffn.errors import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("tiny") / "files")


def refused(made, out, **options) -> str:
    """The message, after which nothing is trained."""
    steps = []
    with pytest.raises(UserError) as caught:
        run(made, out, progress=lambda phase, *_: steps.append(phase), **options)
    assert not {*steps} - {"loading"}
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(files, path, old, new, kind="classification"):
    """A task with a copy of its training file in which one `old` is `new`."""
    text = (files.folder / "train.tsv").read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return files.task(kind, train=str(path))


def test_other_tokenizers(files, tmp_path):
    other = tmp_path / "other"
    tokens = (files.teacher / "vocab.txt").read_text(encoding="utf-8").split("\n")
    tokens[6:8] = tokens[7], tokens[6]  # as large, two words changed places
    transformers.BertModel.from_pretrained(files.teacher).save_pretrained(other)
    (other / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    transformers.BertTokenizer(str(other / "vocab.txt")).save_pretrained(other)
    made = on_task(files, {"hidden": {}}, models={"student": str(other)})
    message = refused(made, tmp_path / "run")
    assert "stages.task: the tokenizers of student and teacher differ" in message


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_split(split, files, tmp_path):
    path = tmp_path / "empty.tsv"
    path.write_text("sentence\tlabel\tscore\n", encoding="utf-8")
    made = on_task(files, {"hard_labels": {}}, task=files.task(**{split: str(path)}))
    message = refused(made, tmp_path / "run")
    assert f"data.task: task tiny, split {split} is empty" in message and str(path) in message


@pytest.mark.parametrize(
    ("kind", "old", "new", "expected"),
    [
        ("classification", "\tlow\t", "\t\t", "has no label"),
        ("classification", "\tlow\t", "\t2\t", "label '2' is out of range: there are 2 classes"),
        ("classification", "\tlow\t", "\tmiddle\t", "classes are low, high"),
        ("classification", "\tlabel\t", "\tlabels\t", "label"),
        ("regression", "\tscore\n", "\tscores\n", "score"),
        ("regression", "\tlow\t", "\tlow\t7", "is not between 0 and 5"),
    ],
)
def test_a_label_that_cannot_be_trained_on(kind, old, new, expected, files, tmp_path):
    task = changed(files, tmp_path / "task.tsv", old, new, kind)
    made = on_task(files, {"hard_labels": {}}, kind=kind, task=task)
    message = refused(made, tmp_path / "run")
    assert message.startswith("data.task: ") and expected in message
    assert "task.tsv" in message  # with the line, where it is one


def test_a_column_that_is_not_there(files, tmp_path):
    made = on_task(files, {"hard_labels": {}}, task=files.task(texts="text"))
    message = refused(made, tmp_path / "run")
    assert "text" in message and "sentence, label, score" in message


def test_sequences_longer_than_the_positions(files, tmp_path):
    task = files.task() | {"max_length": 33}
    message = refused(on_task(files, {"hard_labels": {}}, task=task), tmp_path / "run")
    assert "data.task of stages.task: max_length 33 is longer than the 32 positions" in message


def test_replacing_with_a_loss_on_layers(files, tmp_path):
    made = theseus(files, "stages.replacing.losses.hidden={}")
    message = refused(made, tmp_path / "run")
    assert message.startswith("stages.replacing: losses.hidden compares layers")


def test_relation_heads_that_do_not_divide(files, tmp_path):
    made = on_task(files, {"relations": {"relation_heads": 3}})
    message = refused(made, tmp_path / "run")
    assert "stages.task: relation_heads 3 does not divide the student's width 16" in message


def test_a_mistake_of_the_last_stage_is_told_before_the_first_is_trained(files, tmp_path):
    made = recipe(
        [
            {"name": "first", "data": "task", "losses": {"hidden": {}}},
            {"name": "last", "data": "task", "losses": {"vector": {}}},
        ],
        {"teacher": str(files.classifier), "student": HALF},
        {"task": files.task()},
    )
    assert "stages.last: sentence vectors of 16 and 24" in refused(made, tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


def test_a_teacher_without_a_head(files, tmp_path):
    made = on_task(files, {"soft_labels": {}}, models={"teacher": str(files.teacher)})
    message = refused(made, tmp_path / "run")
    assert "stages.task: its teacher teacher has no head for the task" in message


def test_a_part_that_no_parameter_belongs_to(files, tmp_path):
    made = on_task(files, {"hard_labels": {}}, freeze=["layer.0"])
    assert "no parameter's name starts with 'layer.0'" in refused(made, tmp_path / "run")


def test_everything_frozen(files, tmp_path):
    made = on_task(files, {"hard_labels": {}}, freeze=["layers", "embeddings", "pooler", "head"])
    assert "stages.task: nothing is left to train" in refused(made, tmp_path / "run")


def test_a_batch_that_does_not_divide(files, tmp_path):
    made = on_task(files, {"hard_labels": {}}, batch_size=8, accumulate=3)
    message = refused(made, tmp_path / "run")
    assert "batch_size 8 does not divide into 1 processes x 3 pieces" in message


# -- resumed with something else -----------------------------------------------------------------


def begun(made, out, stage="task"):
    with pytest.raises(Stopped):
        run(made, out, progress=stop_at(stage, 3))
    assert [*out.glob(f"work/*-{stage}/checkpoint-2/sealed.json")]


def test_another_recipe_is_refused_by_the_key(files, tmp_path):
    made = two_stages(files)
    begun(made, tmp_path / "run")
    values = made.to_mapping()
    for path, other in (
        (("stages", 1, "learning_rate"), 2e-3),
        (("stages", 0, "losses", "hidden", "weight"), 2.0),
        (("student", "config", "hidden_size"), 24),
        (("seed",), 1),
    ):
        changed = copy.deepcopy(values)
        *where, last = path
        functools.reduce(operator.getitem, where, changed)[last] = other
        message = refused(Recipe.from_mapping(changed), tmp_path / "run")
        key = ".".join({0: "general", 1: "task"}.get(part, part) for part in path)
        assert key in message and "--fresh" in message
    # How often it is saved is no part of what is computed.
    run(two_stages(files, checkpoint_seconds=60), tmp_path / "run")
    run(made, tmp_path / "whole")
    assert same(student(tmp_path / "run"), student(tmp_path / "whole"))


def test_another_recipe_does_not_go_on_from_the_first_stages_checkpoints(files, tmp_path):
    begun(on_task(files, {"hidden": {}}), tmp_path / "run")
    other = on_task(files, {"hidden": {}}, learning_rate=2e-2)
    try:
        run(other, tmp_path / "run")
    except UserError as error:
        assert "learning_rate" in str(error)
    else:
        run(other, tmp_path / "whole")
        assert same(student(tmp_path / "run"), student(tmp_path / "whole"))


def test_changed_data_are_refused_by_name(files, tmp_path):
    task = changed(files, tmp_path / "task.tsv", "\tlow\t", "\tlow\t")
    made = on_task(files, {"hard_labels": {}}, task=task)
    begun(made, tmp_path / "run")
    changed(files, tmp_path / "task.tsv", "\tlow\t", "\thigh\t")
    message = refused(made, tmp_path / "run")
    assert message.startswith("data.task is not what the run in") and "--fresh" in message
    run(made, tmp_path / "run", fresh=True)


def test_a_changed_teacher_is_refused_by_name(files, tmp_path):
    teacher = files.with_head("SequenceClassification", num_labels=2, classifier_dropout=0.0)
    made = on_task(files, {"hidden": {}}, models={"teacher": str(teacher)})
    begun(made, tmp_path / "run")
    model = transformers.BertForSequenceClassification.from_pretrained(teacher)
    model.bert.encoder.layer[1].output.dense.bias.data += 1
    model.save_pretrained(teacher)
    assert "teacher is not what the run in" in refused(made, tmp_path / "run")


# -- the command ---------------------------------------------------------------------------------


def test_the_command_says_it_in_one_line(files, tmp_path, capsys):
    made = on_task(files, {"relations": {"relation_heads": 3}})
    (tmp_path / "recipe.yaml").write_text(made.to_yaml(), encoding="utf-8")
    out = str(tmp_path / "run")
    assert main(["distill", str(tmp_path / "recipe.yaml"), "--out", out]) == 2
    error = capsys.readouterr().err.strip()
    assert "relation_heads 3" in error and "\n" not in error


def test_a_recipe_of_text_and_task_needs_both(files, tmp_path):
    values = task_values(files) | {
        "data.general.text": tmp_path / "none.txt",
        "data.general.max_length": 24,
        "models.pretrained": files.teacher,
        "models.finetuned": files.classifier,
    }
    made = read("ernie-tiny", [f"{key}={value}" for key, value in values.items()])
    message = refused(made, tmp_path / "run")
    assert "data.general" in message and "none.txt" in message


def test_a_directory_of_something_else_is_left_alone(files, tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    message = refused(two_stages(files), tmp_path)
    assert "holds no run of fastffn" in message
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_answers_of_questions_are_checked(files, tmp_path):
    data = json.loads((files.folder / "train.json").read_text(encoding="utf-8"))
    answers = data["data"][0]["paragraphs"][0]["qas"][0]["answers"]
    answers[0]["answer_start"] += 400
    (tmp_path / "train.json").write_text(json.dumps(data), encoding="utf-8")
    task = files.task("qa", train=str(tmp_path / "train.json"))
    message = refused(on_task(files, {"hard_labels": {}}, kind="qa", task=task), tmp_path / "run")
    assert "data.task" in message and "0-0" in message
