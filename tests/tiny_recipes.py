"""Recipes on a tiny random teacher and a little task, and processes that run them and may die.

A run takes a second or two. Processes are forked from a server that has imported everything, so
that starting one costs next to nothing.
"""

import atexit
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import transformers
from distributed_checks import group_threads
from patience import PATIENCE
from safetensors.torch import load_file
from tiny_teacher import WORDS, save_teacher, write_text
from torch.distributed import TCPStore

from fastffn.cli import main
from fastffn.distill.recipe import Recipe, read

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(
    ["fastffn.distill.engine", "torch.utils.tensorboard", "sklearn.metrics"]
)
LABELS = ("low", "high")
TRAIN, VALIDATION = 30, 12  # three whole batches of 8 and a rest


class Files:
    """A folder with models, a task for each kind, and text.

    Attributes:
        teacher: a BERT of 4 layers of 24 without a head.
        classifier, regressor, reader: the same with a random head for a task.
        text: sentences.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        self.teacher = save_teacher(folder / "teacher")
        self.text = write_text(folder / "text.txt")
        self.classifier = self.with_head("SequenceClassification", id2label=dict(enumerate(LABELS)))
        self.regressor = self.with_head(
            "SequenceClassification", num_labels=1, problem_type="regression"
        )
        self.reader = self.with_head("QuestionAnswering")
        rng = random.Random(7)
        for split, rows in (("train", TRAIN), ("validation", VALIDATION)):
            lines = [_row(rng) for _ in range(rows)]
            text = "\n".join(["sentence\tlabel\tscore", *lines])
            (folder / f"{split}.tsv").write_text(text + "\n", encoding="utf-8")
            squad = json.dumps(_squad(rng, rows // 4))
            (folder / f"{split}.json").write_text(squad, encoding="utf-8")

    def with_head(self, kind: str, **config) -> Path:
        path = self.folder / f"{kind}-{'-'.join(config)}"
        torch.manual_seed(3)
        model = getattr(transformers, f"BertFor{kind}").from_pretrained(self.teacher, **config)
        model.save_pretrained(path)
        transformers.AutoTokenizer.from_pretrained(self.teacher).save_pretrained(path)
        return path

    def task(self, kind: str = "classification", **changes) -> dict:
        """The data part of a recipe: a task of one's own."""
        values = {
            "classification": {"texts": "sentence", "label": "label", "labels": [*LABELS]},
            "regression": {"texts": "sentence", "label": "score", "range": [0, 5]},
            "qa": {},
        }[kind]
        end = "json" if kind == "qa" else "tsv"
        files = {split: str(self.folder / f"{split}.{end}") for split in ("train", "validation")}
        return {
            "task": {"name": "tiny", "kind": kind, **values, **files} | changes,
            "max_length": 24,
        }


def _row(rng: random.Random) -> str:
    words = rng.choices(WORDS, k=rng.randint(2, 14))
    place = WORDS.index(words[0]) / len(WORDS)
    return f"{' '.join(words)}\t{LABELS[place >= 0.5]}\t{place * 5:.2f}"


def _squad(rng: random.Random, articles: int) -> dict:
    data = []
    for article in range(articles):
        words = rng.choices(WORDS, k=rng.randint(8, 24))
        context = " ".join(words)
        questions = []
        for number in range(2):
            first = rng.randrange(len(words) - 2)
            answer = " ".join(words[first : first + 2])
            start = len(" ".join([*words[:first], ""]))
            questions.append(
                {
                    "id": f"{article}-{number}",
                    "question": " ".join(rng.choices(WORDS, k=3)),
                    "answers": [{"text": answer, "answer_start": start}],
                }
            )
        data.append({"title": str(article), "paragraphs": [{"context": context, "qas": questions}]})
    return {"version": "1.1", "data": data}


# -- recipes -------------------------------------------------------------------------------------

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HALF = {"like": "teacher", "config": {"num_hidden_layers": 2, "hidden_size": 16, **NO_DROPOUT}}
ALL_LOSSES = {
    "relations": {"relation_heads": 8},
    "hidden": {"embeddings": True},
    "scores": {},
    "padded": {"kind": "scores", "masked": "zero"},
    "soft_labels": {"temperature": 2.0},
    "hard_labels": {"weight": 0.5},
}


def recipe(stages: list[dict], models: dict, data: dict, **more) -> Recipe:
    """A recipe of a checkpoint after every step; stages of 6 steps of 8 examples."""
    common = {"steps": 6, "batch_size": 8, "learning_rate": 1e-3}
    values = {"name": "tiny", "checkpoint_seconds": 1e-6, "data": data}
    values["stages"] = [common | stage for stage in stages]
    top = {name: models[name] for name in ("teacher", "student") if name in models}
    rest = {name: spec for name, spec in models.items() if name not in top}
    return Recipe.from_mapping(values | top | {"models": rest} | more)


def two_stages(files: Files, **more) -> Recipe:
    """Relations and hidden states with projections, on text, then on a task with its labels."""
    losses = {"relations": {"relation_heads": 8}, "hidden": {"embeddings": True}}
    student = {"like": "teacher", "config": {"num_hidden_layers": 2, "hidden_size": 16}}
    return recipe(
        [
            {"name": "general", "data": "general", "losses": losses},
            {"name": "task", "data": "task", "losses": losses | {"hard_labels": {}}},
        ],
        {"teacher": str(files.classifier), "student": student},
        {"general": {"text": str(files.text), "max_length": 24}, "task": files.task()},
        **more,
    )


def on_task(
    files: Files, losses, models=None, kind="classification", task=None, more=None, **stage
) -> Recipe:
    """A recipe of one stage on the task, from a teacher with its head."""
    heads = {"regression": files.regressor, "qa": files.reader}
    teacher = heads.get(kind, files.classifier)
    models = {"teacher": str(teacher), "student": HALF} | (models or {})
    stages = [{"name": "task", "data": "task", "losses": losses, **stage}]
    return recipe(stages, models, {"task": task or files.task(kind)}, **(more or {}))


def theseus(files: Files, *overrides: str, kind: str = "classification", teacher=None) -> Recipe:
    """The shipped recipe on the tiny task."""
    values = {"teacher.load": teacher or files.classifier, "student.layers": 2}
    values |= task_values(files, kind)
    values |= {f"stages.{name}.learning_rate": 1e-3 for name in ("replacing", "successor")}
    return read("theseus", [*shortened(values, "replacing", "successor"), *overrides])


def task_values(files: Files, kind: str = "classification") -> dict:
    """Values of a shipped recipe's overrides: its data are the tiny task."""
    return {f"data.task.{key}": json.dumps(value) for key, value in files.task(kind).items()}


def shortened(values: dict, *stages: str, steps: int = 6) -> list[str]:
    """Overrides of a shipped recipe: these, short stages, a checkpoint after every step."""
    values = values | {"checkpoint_seconds": 0.000001}
    for name in stages:
        values |= {f"stages.{name}.steps": steps, f"stages.{name}.batch_size": 8}
    return [f"{key}={value}" for key, value in values.items()]


# -- runs ----------------------------------------------------------------------------------------


def student(out: Path) -> dict[str, torch.Tensor]:
    """The weights of a finished run's student."""
    return load_file(out / "student" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two models' weights are the same bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stopped(Exception):
    """Raised by `stop_at`."""


def stop_at(stage: str, step: int):
    """A `progress` that ends a run at the end of a step."""

    def progress(phase: str, done: float, total: float, text: str) -> None:
        if (phase, done) == (stage, step):
            raise Stopped

    return progress


def spawn(what: Recipe, out: Path, die_at: int | float | None = None, processes: int = 1) -> int:
    """Runs `fastffn distill` in processes of its own, as torchrun starts them if they are several.

    Args:
        die_at: an integer: kill -9 before the run touches a file of `out` for that time; a float:
            so many seconds after its first checkpoint is begun. With several processes the first
            dies, the others are killed then.

    Returns:
        The exit status of the first; -9 if it was killed. What it said is in `out`.log, when it
        touched which file in `out`.touched, see `touched`.
    """
    # As torchrun does: where processes meet is here, so that its port is theirs from the beginning.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yaml = Path(f"{out}.yaml")
    yaml.write_text(what.to_yaml(), encoding="utf-8")
    started = []
    for rank in range(processes):
        distributed = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
        distributed |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        distributed |= {"TORCHELASTIC_USE_AGENT_STORE": True}
        environment = {name: str(value) for name, value in distributed.items()}
        arguments = (yaml, out, environment if processes > 1 else {}, None if rank else die_at)
        started.append(_FORK.Process(target=_run, args=arguments))
        started[-1].start()
    started[0].join(PATIENCE)
    for process in started:
        if started[0].exitcode == 0:
            process.join(PATIENCE)
        process.kill()
        process.join()
    return started[0].exitcode


def said(out: Path) -> str:
    """What the processes of a run have said."""
    return Path(f"{out}.log").read_text(encoding="utf-8")


def touched(out: Path) -> list[tuple[str, str]]:
    """(event, path within `out`) in order, of the last run that came to its end."""
    return [tuple(entry) for entry in json.loads(Path(f"{out}.touched").read_text())]


def _run(yaml: Path, out: Path, environment: dict[str, str], die_at: int | float | None) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    watch = _Watch(out, die_at)
    sys.addaudithook(watch)
    status = main(["distill", str(yaml), "--out", str(out)])
    if status == 0 and environment:
        atexit._run_exitfuncs()  # a forked process would end without
        assert not group_threads()
    if status == 0 and environment.get("RANK", "0") == "0":
        Path(f"{out}.touched").write_text(json.dumps(watch.seen))
    sys.exit(status)


class _Watch:
    """An audit hook that notes what happens to files of a folder, and may kill the process."""

    def __init__(self, folder: Path, die_at: int | float | None):
        self.folder, self.die_at, self.seen = f"{folder}{os.sep}", die_at, []
        self.alarm: threading.Timer | None = None

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            return
        path = str(arguments[event == "os.rename"])  # onto which, not from which
        if not path.startswith(self.folder):
            return
        if len(self.seen) == self.die_at:
            self.die()
        if isinstance(self.die_at, float) and not self.alarm and "/checkpoint-" in path:
            self.alarm = threading.Timer(self.die_at, self.die)
            self.alarm.start()
        self.seen.append((event, path.removeprefix(self.folder)))

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
