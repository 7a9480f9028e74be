"""Tasks: layouts of local files, the user's own, labels, limits, and what is refused."""

import json
import os
import sys
import types
from pathlib import Path

import pytest

from fastffn.data.catalogue import Part
from fastffn.data.tasks import TASKS, Examples, load_task
from fastffn.errors import UserError
from fastffn.evaluate.metrics import METRICS, OF_KIND


@pytest.fixture(autouse=True)
def real_data(monkeypatch):
    """The folder of the data sets; tests must not find it unless they ask for it."""
    folder = os.environ.get("FASTFFN_DATA")
    monkeypatch.delenv("FASTFFN_DATA", raising=False)
    return folder


def write(folder, **files):
    """Tab-separated files: rows of fields, `_` of a name for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join("\t".join(map(str, row)) + "\n" for row in rows)
        (folder / name.replace("_tsv", ".tsv").replace("_txt", ".txt")).write_text(text)
    return folder


HEADER = ("sentence", "label")
TRAIN = [HEADER, ("good .", 1), ("bad .", 0), ("fine .", 1)]
DEV = [HEADER, ("poor .", 0), ("nice .", 1)]


def test_every_known_task_is_whole():
    assert {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"} <= TASKS.keys()
    assert {"chnsenticorp", "tnews", "squad", "squad2"} <= TASKS.keys()
    for name, task in TASKS.items():
        assert task.name == name and task.folders
        assert task.labels if task.kind == "classification" else task.labels is None
        for layout in task.layouts:
            assert {"train", "validation"} <= layout.splits.keys()
            assert layout.columns.keys() <= {*task.texts, task.label}
            for parts in layout.splits.values():
                for part in parts:
                    assert isinstance(part, Part) and Path(part.file).suffix
                    if part.names:
                        wanted = (*task.texts, task.label)
                        assert {layout.columns.get(c, c) for c in wanted} <= set(part.names)
    assert TASKS["cola"].metrics[0] == "matthews" and TASKS["stsb"].metrics == OF_KIND["regression"]
    assert len(TASKS["tnews"].labels) == 15 and TASKS["stsb"].range == (0, 5)


def test_metric_names_are_those_that_exist():
    assert {*OF_KIND["classification"], *OF_KIND["regression"]} == METRICS.keys()


def test_glue_layout_in_its_folder_and_above(tmp_path, monkeypatch):
    write(
        tmp_path / "SST-2", train_tsv=TRAIN, dev_tsv=DEV, test_tsv=[("index", "sentence"), (0, "x")]
    )
    data = load_task("sst2", tmp_path / "SST-2")
    assert data.task is TASKS["sst2"] and list(data.splits) == ["train", "validation"]
    assert data.splits["train"] == Examples(["good .", "bad .", "fine ."], None, [1, 0, 1])
    assert data.splits["validation"].first == ["poor .", "nice ."]
    assert load_task("sst2", str(tmp_path)).splits == data.splits
    assert data.origin["train"] == str(tmp_path / "SST-2" / "train.tsv")
    monkeypatch.setenv("FASTFFN_DATA", str(tmp_path))
    assert load_task("sst2", splits=["validation"]).splits == {
        "validation": data.splits["validation"]
    }


def test_sst2_with_a_labelled_test_file(tmp_path):
    """There GLUE's dev rows are test.tsv; dev.tsv belongs to training, whatever is asked for."""
    write(tmp_path, train_tsv=TRAIN, dev_tsv=DEV, test_tsv=[HEADER, ("held out", 1)])
    data = load_task("sst2", tmp_path)
    assert len(data.splits["train"]) == 5 and data.splits["validation"].first == ["held out"]
    for split in ("train", "validation"):
        assert load_task("sst2", tmp_path, [split]).splits[split] == data.splits[split]


def test_originals_of_cola_mrpc_stsb_and_rte(tmp_path):
    row = ("gj04", 1, "", "They left.")
    write(
        tmp_path / "cola",
        in_domain_train_tsv=[row, ("gj04", 0, "*", "Left they.")],
        in_domain_dev_tsv=[row],
        out_of_domain_dev_tsv=[row, row],
    )
    data = load_task("cola", tmp_path)
    assert data.splits["train"] == Examples(["They left.", "Left they."], None, [1, 0])
    assert len(data.splits["validation"]) == 3

    header = ("\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String")
    rows = [header, (1, 7, 8, 'He said "no', "No"), (0, 7, 9, "A", "B")]
    write(tmp_path / "mrpc", msr_paraphrase_train_txt=rows, msr_paraphrase_test_txt=rows[:2])
    data = load_task("mrpc", tmp_path)
    assert data.splits["train"] == Examples(['He said "no', "A"], ["No", "B"], [1, 0])

    row = ("news", "f", "2012", "1", "2.500", "A man.", "A dog.")
    files = {f"sts-{split}_tsv": [row, (*row, "url", "url")] for split in ("train", "dev", "test")}
    write(tmp_path / "stsb", **files)
    data = load_task("stsb", tmp_path, ("train", "validation", "test"))
    assert data.splits["test"] == Examples(["A man."] * 2, ["A dog."] * 2, [2.5, 2.5])

    header, row = (
        ("index", "sentence1", "sentence2", "label"),
        (0, "It rains.", "It pours.", "entailment"),
    )
    write(
        tmp_path / "RTE",
        train_tsv=[header, row],
        val_tsv=[(1, "Sun.", "Rain.", "not_entailment")],
        dev_tsv=[header, row],
    )
    data = load_task("rte", tmp_path)
    assert data.splits["train"].labels == [0, 1] and data.splits["validation"].labels == [0]
    write(tmp_path / "RTE", val_tsv=[(1, "Sun.", "Rain.", "maybe")])
    with pytest.raises(UserError, match=r"val\.tsv:1: label 'maybe'"):
        load_task("rte", tmp_path)
    (tmp_path / "RTE" / "val.tsv").unlink()
    assert len(load_task("rte", tmp_path).splits["train"]) == 1


def test_mnli_has_two_validation_splits(tmp_path):
    rows = [("sentence1", "sentence2", "label1", "gold_label"), ("a", "b", "-", "neutral")]
    write(tmp_path / "MNLI", train_tsv=rows, dev_matched_tsv=rows, dev_mismatched_tsv=rows * 1)
    data = load_task("mnli", tmp_path, ("validation", "validation_mismatched"))
    assert data.splits["validation"] == Examples(["a"], ["b"], [1])
    assert data.origin["validation_mismatched"].endswith("dev_mismatched.tsv")
    with pytest.raises(UserError, match="has no split dev: choose from train, validation"):
        load_task("mnli", tmp_path, ("dev",))


def test_chinese_tasks(tmp_path):
    write(tmp_path / "ChnSentiCorp", train_tsv=[("很好", "positive")], dev_tsv=[("差", "negative")])
    data = load_task("chnsenticorp", tmp_path)
    assert data.splits["train"].labels == [1] and data.splits["validation"].first == ["差"]
    rows = [("label", "text_a"), ("1", "很好")]
    write(tmp_path / "ChnSentiCorp", train_tsv=rows, dev_tsv=rows)
    assert load_task("chnsenticorp", tmp_path).splits["train"].labels == [1]
    row = {"label": "102", "label_desc": "news_entertainment", "sentence": "甜", "keywords": ""}
    for file in ("train.json", "dev.json"):
        write(tmp_path / "tnews").joinpath(file).write_text(json.dumps(row) + "\n")
    assert load_task("tnews", tmp_path).splits["train"] == Examples(["甜"], None, [2])


def test_limit_is_a_repeatable_choice_in_order(tmp_path):
    rows = [HEADER, *((f"sentence {k}", k % 2) for k in range(50))]
    write(tmp_path, train_tsv=rows, dev_tsv=rows)

    def chosen(limit, seed=0, split="train"):
        return load_task("sst2", tmp_path, limit=limit, seed=seed).splits[split].first

    few = chosen(10)
    assert len(few) == 10 and few == sorted(few, key=lambda text: int(text.split()[1]))
    assert few == chosen({"train": 10}) != chosen(10, seed=1) and few != chosen(50)[:10]
    assert set(few) < set(chosen(20)) and len(chosen(99)) == 50
    assert len(chosen(10, split="validation")) == 50
    assert len(chosen({"validation": 7}, split="validation")) == 7
    for wrong in (0, {"train": -1}, {"train": "5"}, True):
        with pytest.raises(UserError, match="is no positive number"):
            chosen(wrong)


# -- own tasks ---------------------------------------------------------------------------------


def own(folder, rows, validation=None, **options):
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "mine", "texts": "text", "train": "own.jsonl", **options}
    splits = ("train",)
    if validation is not None:
        (folder / "own2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in validation))
        task["validation"], splits = ["own2.jsonl"], ("train", "validation")
    return load_task(task, folder, splits)


def test_own_task_finds_its_classes(tmp_path):
    rows = [{"text": text, "label": text} for text in ("cat", "ape", "bee", "ape")]
    data = own(tmp_path, rows, rows[2:])
    assert data.task.labels == ("ape", "bee", "cat") and data.task.metrics == ("accuracy",)
    assert data.splits["train"].labels == [2, 0, 1, 0] and data.splits["validation"].labels == [
        1,
        0,
    ]
    numbers = [{"text": "x", "label": label} for label in (10, 9.0, 2)]
    assert own(tmp_path, numbers).task.labels == ("2", "9", "10")
    assert own(tmp_path, numbers).splits["train"].labels == [2, 1, 0]
    flags = [{"text": "x", "label": label} for label in (True, False)]
    assert own(tmp_path, flags).splits["train"].labels == [1, 0]
    with pytest.raises(UserError, match="label 'dog' is unknown: classes are ape, bee, cat"):
        own(tmp_path, rows, [{"text": "x", "label": "dog"}])
    with pytest.raises(UserError, match="labels of one class only"):
        own(tmp_path, rows[:1])


def test_own_pairs_and_regression(tmp_path, monkeypatch):
    rows = [{"a": "x", "b": "y", "score": -1.5}, {"a": "u", "b": "v", "score": "-1"}]
    options = {"texts": ["a", "b"], "label": "score", "kind": "regression", "metrics": ["spearman"]}
    data = own(tmp_path, rows, **options)
    assert data.splits["train"] == Examples(["x", "u"], ["y", "v"], [-1.5, -1.0])
    assert data.task.metrics == ("spearman",)
    with pytest.raises(UserError, match=r"own\.jsonl:1: label -1.5 is not between 0 and 5"):
        own(tmp_path, rows, **options, range=[0, 5])
    monkeypatch.setenv("FASTFFN_DATA", "/elsewhere")
    monkeypatch.chdir(tmp_path)
    task = {"name": "mine", "train": "own.jsonl", **options}
    assert load_task(task, splits=("train",)).splits == data.splits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "a"}, "text is unknown: known are name, kind, texts"),
        ({"kind": "ranking"}, "kind 'ranking' is unknown: choose classification or"),
        ({"metrics": ["pearson"]}, "metric pearson is none of classification"),
        ({"metrics": "f1", "labels": ["a", "b", "c"]}, "choose macro_f1"),
        ({"labels": ["a", "a"]}, "at least two different"),
        ({"kind": "regression", "labels": ["a", "b"]}, "has no classes"),
        ({"texts": ["a", "b", "c"]}, "one or two columns, not 3"),
        ({"texts": 3}, "texts 3 is neither a name nor a list"),
        ({"kind": "regression", "range": 5}, "range 5 is not"),
        ({"hub": "own/data"}, "give either files"),
        ({"train": None}, "give either files"),
        ({"train": "none.tsv"}, "none.tsv does not exist"),
        ({"label": "class"}, "has no column class: it has text, label"),
    ],
)
def test_own_tasks_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(UserError, match=message) as caught:
        own(tmp_path, [{"text": "a", "label": 0}, {"text": "b", "label": 1}], **options)
    assert "\n" not in str(caught.value)


def test_own_task_without_the_split(tmp_path):
    (tmp_path / "own.tsv").write_text("sentence\tlabel\nx\t0\ny\t1\n")
    with pytest.raises(UserError, match="no files of split validation: give validation: FILE"):
        load_task({"name": "mine", "train": str(tmp_path / "own.tsv")})


# -- what is refused before training ------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([HEADER], r"task sst2, split train is empty: .*train\.tsv holds no examples"),
        ([HEADER, ("x", "")], r"split train: train\.tsv:2 has no label"),
        ([HEADER, ("x", 1), ("y", -1)], r"train\.tsv:3: label '-1' is unknown"),
        (
            [HEADER, ("x", 2)],
            r"train\.tsv:2: label '2' is out of range: there are 2 classes, 0 to 1",
        ),
        ([HEADER, ("x", "maybe")], "label 'maybe' is unknown: classes are negative, positive"),
        ([HEADER, ("x",)], r"train\.tsv:2 has 1 fields"),
        ([("text", "label"), ("x", 1)], r"train\.tsv has no column sentence: it has text, label"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    write(tmp_path, train_tsv=rows, dev_tsv=DEV)
    with pytest.raises(UserError, match=message) as caught:
        load_task("sst2", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", ["nan", "high", "5.01", ""])
def test_bad_scores_are_named(tmp_path, label):
    row = ("news", "f", "2012", "1", label, "A man.", "A dog.")
    write(tmp_path, **{"sts-train_tsv": [row], "sts-dev_tsv": [row]})
    with pytest.raises(UserError, match=r"split train: sts-train\.tsv:1"):
        load_task("stsb", tmp_path)


def test_hidden_labels_and_texts_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"own\.jsonl:1 has no label"):
        own(tmp_path, [{"text": "a", "label": -1}])
    with pytest.raises(UserError, match=r"own\.jsonl:1 has no label"):
        own(tmp_path, [{"text": "a", "label": None}])
    with pytest.raises(UserError, match=r"own\.jsonl:1: text is no text but None"):
        own(tmp_path, [{"text": None, "label": 1}])


def test_data_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="task 'sst' is unknown: choose from cola, sst2"):
        load_task("sst")
    with pytest.raises(UserError, match="does not exist"):
        load_task("sst2", tmp_path / "none")
    with pytest.raises(UserError, match=r"holds train\.tsv \+ dev\.tsv \+ test\.tsv or train\.tsv"):
        load_task("sst2", tmp_path)
    with pytest.raises(UserError, match="task chnsenticorp has no data: give the folder"):
        load_task("chnsenticorp")


# -- the hub -----------------------------------------------------------------------------------


class HubData(dict):
    @property
    def column_names(self):
        return list(self)


@pytest.fixture
def hub(monkeypatch):
    """A library `datasets` that holds what is put here: (name, configuration, split) -> columns."""
    held = {}

    def load_dataset(name, config, split):
        if (name, config, split) not in held:
            raise OSError("no such thing\nin many lines")
        return HubData(held[name, config, split])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return held


def test_hub(hub, tmp_path, monkeypatch):
    columns = {"sentence": ["a", "b"], "label": [1, 0], "idx": [0, 1]}
    hub["nyu-mll/glue", "sst2", "train"] = hub["nyu-mll/glue", "sst2", "validation"] = columns
    data = load_task("sst2")
    assert data.splits["train"] == Examples(["a", "b"], None, [1, 0])
    assert data.origin["train"] == "hub data set nyu-mll/glue/sst2, train"
    monkeypatch.setenv("FASTFFN_DATA", str(tmp_path))  # which does not have it
    assert load_task("sst2").splits == data.splits
    own_task = {"name": "mine", "hub": ["nyu-mll/glue", "sst2"]}
    assert load_task(own_task).splits == data.splits
    assert load_task({**own_task, "hub": "nyu-mll/glue/sst2"}).splits == data.splits
    with pytest.raises(UserError, match=r"cannot be had: no such thing \(or give local files"):
        load_task({**own_task, "hub": "own/data"})
    monkeypatch.delenv("FASTFFN_DATA")
    hub["nyu-mll/glue", "mnli", "validation_matched"] = {"premise": ["a"], "label": [2]}
    with pytest.raises(UserError, match="no column hypothesis: it has premise, label"):
        load_task("mnli", splits=("validation",))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets, or give local files"):
        load_task("sst2")


# -- real data ---------------------------------------------------------------------------------

ROWS = {
    "sst2": (67_349, 872),
    "cola": (8_551, 1_043),
    "mrpc": (4_076, 1_725),
    "stsb": (5_749, 1_500),
    "rte": (2_490, 277),
    "chnsenticorp": (9_600, 1_200),
    "tnews": (53_360, 10_000),
    "squad": (8_992, 1_578),
}


@pytest.mark.data
@pytest.mark.parametrize("name", ROWS)
def test_real_data(name, real_data):
    data = load_task(name, real_data)
    assert tuple(len(examples) for examples in data.splits.values()) == ROWS[name]
    if data.task.kind == "classification":
        for examples in data.splits.values():
            assert set(examples.labels) == set(range(len(data.task.labels)))


@pytest.mark.data
def test_real_labels_mean_what_they_say(real_data):
    sst2 = load_task("sst2", real_data).splits["validation"]
    charming = sst2.first.index("it 's a charming and often affecting journey . ")
    assert TASKS["sst2"].labels[sst2.labels[charming]] == "positive"
    mrpc = load_task("mrpc", real_data).splits["train"]
    assert mrpc.first[0].startswith("Amrozi") and mrpc.labels[0] == 1 and "\t" not in mrpc.first[0]
    stsb = load_task("stsb", real_data).splits["validation"]
    assert stsb.labels[3] == 2.4 and stsb.second[3] == "A man is playing guitar."
