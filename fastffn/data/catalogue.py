"""What a task is, and the tasks that are known by name: GLUE, two Chinese ones, SQuAD.

A known task says how its data are called on the hub and how they lie in folders. Several layouts
of the same data are in use; the first whose files are there, with their columns, is read.

Which file is which where it is not obvious:

    sst2    GLUE keeps the labels of its test set. Copies with three labelled files have GLUE's
            872 dev rows as test.tsv, and its train rows parted in train.tsv and dev.tsv: there
            train is both and validation is test.tsv.
    rte     Copies with val.tsv have GLUE's train rows parted in train.tsv and val.tsv.
    cola    The original dev rows come in two files, in and out of domain; GLUE's are both.
    mrpc    Validation is the original test set, whose labels are public; GLUE's dev rows are a
            part of the original train rows.
    squad   Where there is one file, a fifth of its articles is validation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastffn.errors import UserError
from fastffn.evaluate.metrics import OF_KIND


@dataclass(frozen=True)
class Part:
    """A file of a split, or a share of one.

    Attributes:
        file: its path in the task's folder.
        names: the columns' names where the file has no header.
        ragged: as in `read_table`.
        articles: of a SQuAD file: "all", or "train" or "validation" of one that both share.
    """

    file: str
    names: tuple[str, ...] | None = None
    ragged: str = "error"
    articles: str = "all"


@dataclass(frozen=True)
class Layout:
    """How a task's files lie: the parts of each split, and the task's columns by their names here.

    Attributes:
        splits: name -> parts, read one after another.
        columns: the task's column -> the file's, where they differ.
    """

    splits: Mapping[str, tuple[Part, ...]]
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A supervised task.

    Attributes:
        kind: "classification", "regression" or "qa".
        texts: the one or two columns of text.
        label: the column of labels.
        labels: names of the classes in order; None: as they are found in the training split.
        metrics: what is computed; the first is what a report shows.
        range: least and largest label of a regression; None: any.
        hub: data set and configuration on the hub.
        hub_splits: split -> its name on the hub, where it differs.
        folders: how the task's folder may be called below a folder of data sets.

    Raises:
        UserError: an unknown kind or metric, or a number of texts or classes that does not fit.
    """

    name: str
    kind: str = "classification"
    texts: tuple[str, ...] = ("sentence",)
    label: str = "label"
    labels: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ()
    range: tuple[float, float] | None = None
    hub: tuple[str, str | None] | None = None
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    layouts: tuple[Layout, ...] = ()

    def __post_init__(self):
        name = f"task {self.name}"
        if self.kind not in OF_KIND:
            raise UserError(f"{name}: kind {self.kind!r} is unknown: choose {' or '.join(OF_KIND)}")
        if not self.metrics:
            object.__setattr__(self, "metrics", (OF_KIND[self.kind][0],))
        for metric in self.metrics:
            if metric not in OF_KIND[self.kind]:
                raise UserError(
                    f"{name}: metric {metric} is none of {self.kind}: "
                    f"choose from {', '.join(OF_KIND[self.kind])}"
                )
        if len(self.texts) not in (1, 2):
            raise UserError(f"{name}: texts are one or two columns, not {len(self.texts)}")
        if self.labels is not None:
            if self.kind != "classification":
                raise UserError(f"{name}: a {self.kind} task has no classes: leave labels out")
            if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
                raise UserError(f"{name}: labels must be at least two different names")
            if "f1" in self.metrics and len(self.labels) > 2:
                raise UserError(
                    f"{name}: metric f1 is of two classes, there are {len(self.labels)}: "
                    "choose macro_f1"
                )


# -- layouts -----------------------------------------------------------------------------------


def _glue(
    columns: Mapping[str, str] | None = None,
    names: tuple[str, ...] | None = None,
    ragged: str = "error",
) -> Layout:
    """The official GLUE download: its test sets have no labels."""
    parts = {
        split: (Part(file, names, ragged),)
        for split, file in (("train", "train.tsv"), ("validation", "dev.tsv"))
    }
    return Layout(parts, columns or {})


_COLA_COLUMNS = ("source", "label", "mark", "sentence")
_STS_COLUMNS = ("genre", "file", "year", "index", "label", "sentence1", "sentence2")
_MRPC_COLUMNS = {"label": "Quality", "sentence1": "#1 String", "sentence2": "#2 String"}


def _parts(names: tuple[str, ...] | None = None, ragged: str = "error", **files: str | tuple):
    """Splits as keyword arguments: a file or several."""
    return {
        split: tuple(
            Part(file, names, ragged) for file in ([given] if isinstance(given, str) else given)
        )
        for split, given in files.items()
    }


_CHINESE = _parts(names=("text", "label"), train="train.tsv", validation="dev.tsv")


def _squad(version: str) -> tuple[Layout, ...]:
    """The files as published, or one of them alone, shared by article."""
    train, dev = f"train-v{version}.json", f"dev-v{version}.json"
    whole = Layout(_parts(train=train, validation=dev))
    shared = tuple(
        Layout(
            {split: (Part(file, articles=split),) for split in ("train", "validation")},
        )
        for file in (dev, f"dev-{version}.json", train)
    )
    return (whole, *shared)


def _hub(config: str) -> tuple[str, str]:
    return "nyu-mll/glue", config


# -- the tasks ---------------------------------------------------------------------------------

_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")

_ALL = (
    Task(
        "cola",
        labels=("unacceptable", "acceptable"),
        metrics=("matthews", "accuracy"),
        hub=_hub("cola"),
        folders=("CoLA", "cola"),
        layouts=(
            Layout(
                _parts(
                    names=_COLA_COLUMNS,
                    train="in_domain_train.tsv",
                    validation=("in_domain_dev.tsv", "out_of_domain_dev.tsv"),
                )
            ),
            _glue(names=_COLA_COLUMNS),
        ),
    ),
    Task(
        "sst2",
        labels=("negative", "positive"),
        hub=_hub("sst2"),
        folders=("SST-2", "sst2", "sst2_glue"),
        layouts=(
            Layout(_parts(train=("train.tsv", "dev.tsv"), validation="test.tsv")),
            _glue(),
        ),
    ),
    Task(
        "mrpc",
        texts=_PAIR,
        labels=("not_equivalent", "equivalent"),
        metrics=("f1", "accuracy"),
        hub=_hub("mrpc"),
        folders=("MRPC", "mrpc"),
        layouts=(
            _glue(_MRPC_COLUMNS),
            Layout(
                _parts(
                    train="msr_paraphrase_train.txt",
                    validation="msr_paraphrase_test.txt",
                ),
                _MRPC_COLUMNS,
            ),
        ),
    ),
    Task(
        "qqp",
        texts=("question1", "question2"),
        labels=("not_duplicate", "duplicate"),
        metrics=("f1", "accuracy"),
        hub=_hub("qqp"),
        folders=("QQP", "qqp"),
        # A few questions of the published file hold line ends.
        layouts=(_glue({"label": "is_duplicate"}, ragged="skip"),),
    ),
    Task(
        "stsb",
        kind="regression",
        texts=_PAIR,
        metrics=("pearson", "spearman"),
        range=(0.0, 5.0),
        hub=_hub("stsb"),
        folders=("STS-B", "stsb", "stsbenchmark"),
        layouts=(
            Layout(
                _parts(  # some rows end with two columns on licences
                    names=_STS_COLUMNS,
                    ragged="extra",
                    train="sts-train.tsv",
                    validation="sts-dev.tsv",
                    test="sts-test.tsv",
                )
            ),
            _glue({"label": "score"}),
        ),
    ),
    Task(
        "mnli",
        texts=("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
        hub=_hub("mnli"),
        hub_splits={"validation": "validation_matched"},
        folders=("MNLI", "mnli"),
        layouts=(
            Layout(
                _parts(
                    train="train.tsv",
                    validation="dev_matched.tsv",
                    validation_mismatched="dev_mismatched.tsv",
                ),
                {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
            ),
        ),
    ),
    Task(
        "qnli",
        texts=("question", "sentence"),
        labels=_ENTAILMENT,
        hub=_hub("qnli"),
        folders=("QNLI", "qnli"),
        layouts=(_glue(),),
    ),
    Task(
        "rte",
        texts=_PAIR,
        labels=_ENTAILMENT,
        hub=_hub("rte"),
        folders=("RTE", "rte"),
        layouts=(
            Layout(
                {
                    "train": (
                        Part("train.tsv"),
                        Part("val.tsv", names=("index", *_PAIR, "label")),
                    ),
                    "validation": (Part("dev.tsv"),),
                }
            ),
            _glue(),
        ),
    ),
    Task(
        "wnli",
        texts=_PAIR,
        labels=("not_entailment", "entailment"),
        hub=_hub("wnli"),
        folders=("WNLI", "wnli"),
        layouts=(_glue(),),
    ),
    Task(
        "chnsenticorp",
        texts=("text",),
        labels=("negative", "positive"),
        folders=("chnsenticorp", "ChnSentiCorp", "zh_chnsenticorp"),
        layouts=(
            Layout(_parts(train="train.tsv", validation="dev.tsv"), {"text": "text_a"}),
            Layout(_CHINESE),
        ),
    ),
    Task(
        "tnews",
        labels=(
            "news_story",
            "news_culture",
            "news_entertainment",
            "news_sports",
            "news_finance",
            "news_house",
            "news_car",
            "news_edu",
            "news_tech",
            "news_military",
            "news_travel",
            "news_world",
            "news_stock",
            "news_agriculture",
            "news_game",
        ),
        hub=("clue/clue", "tnews"),
        folders=("tnews", "TNEWS", "tnews_public", "zh_tnews"),
        layouts=(
            Layout(_parts(train="train.json", validation="dev.json"), {"label": "label_desc"}),
            Layout(_CHINESE, {"sentence": "text"}),
        ),
    ),
    Task(
        "squad",
        kind="qa",
        texts=("question", "context"),
        label="answers",
        metrics=("f1", "exact_match"),
        hub=("rajpurkar/squad", None),
        folders=("SQuAD", "squad", "squad_v1.1", "squad_v1.1_dev_rebuilt"),
        layouts=_squad("1.1"),
    ),
    Task(
        "squad2",
        kind="qa",
        texts=("question", "context"),
        label="answers",
        metrics=("f1", "exact_match"),
        hub=("rajpurkar/squad_v2", None),
        folders=("SQuAD2", "squad2", "squad_v2", "squad_v2.0", "SQuAD"),
        layouts=_squad("2.0"),
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}
