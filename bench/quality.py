"""How good students are: tasks x methods x seeds, on real data with a real teacher.

    python -m bench.quality --data DIR --text FILES... [--tasks mrpc stsb] [--methods theseus]
                            [--seeds 0 1 2] [--budget 1] [--out runs/quality]

Each cell is one or two runs of shipped recipes in a directory of its own. The same command again
goes on with what is missing; a cell that was interrupted goes on where it was. `table.md` and
`quality.json` are written anew after each cell, of all cells that are there: several processes may
share an --out, each with tasks of its own.

    teacher         all-MiniLM-L6-v2 (or --teacher), fine-tuned on the task; for Chinese a small
                    BERT of random weights and the published vocabulary, trained on the task
    student         half of the teacher's layers (1, 3, 5 of 6), and an EfficientBERT of their size
    finetune        the student of the pre-trained layers, on the labels alone
    finetune-task   the same from the fine-tuned teacher's layers, where the other methods begin
    soft-label ...  the recipes of that name. General stages are shared by the tasks

Every method takes the same number of steps on the task, whatever its stages: `budget` times what
TASKS says, in batches of 32. General stages take budget times GENERAL sequences of text.
"""

import argparse
import contextlib
import fcntl
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from fastffn.distill import run
from fastffn.files import write_text_atomic

GENERAL = 24_000  # sequences of 128 tokens in a general stage, at budget 1
BATCH = 32


class Setting(NamedTuple):
    """Of a task: examples that a student sees at budget 1, the teacher's epochs, tokens, and
    training rows (a subset keeps the teacher's fine-tuning short); folder of a vocabulary for a
    teacher that starts at random."""

    examples: int
    epochs: int = 3
    max_length: int = 128
    limit: int | None = None
    vocabulary: str = ""


TASKS = {
    "mrpc": Setting(48_000, epochs=4),
    "stsb": Setting(34_000, epochs=4),
    "sst2": Setting(60_000, epochs=2, max_length=64, limit=20_000),
    "rte": Setting(40_000, epochs=4),
    "cola": Setting(50_000, epochs=4, max_length=64),
    "chnsenticorp": Setting(28_000, epochs=3, max_length=96, vocabulary="zh_vocab"),
}
# ERNIE-Tiny's ablation: the stages that are left.
ABLATION = {
    "ernie-tiny": ("gd", "ged", "tad", "tsd"),
    "ernie-tiny-gd": ("ged", "tad", "tsd"),
    "ernie-tiny-ged": ("gd", "tad", "tsd"),
    "ernie-tiny-tad": ("gd", "ged", "tsd"),
    "ernie-tiny-all": ("tsd",),
}
METHODS = (
    *("finetune", "finetune-task", "soft-label", "theseus", "minilm", "minilmv2"),
    *("tinybert", "efficientbert", *ABLATION),
)


@dataclass
class Bench:
    """Choices of the whole bench; methods run cells."""

    data: Path
    text: Sequence[Path]
    out: Path
    teacher: str
    budget: float
    precision: str

    def teach(self, folder: str) -> str:
        """A teacher that only runs forward: in half precision if the students are."""
        dtype = "bfloat16" if self.precision == "bf16" else "float32"
        return f"{{load: {folder}, dtype: {dtype}}}"

    # -- one run of a recipe ---------------------------------------------------------------------

    def recipe(self, name: str, folder: Path, overrides: Sequence[str], seed: int) -> dict:
        """Runs a shipped recipe, or takes its finished report."""

        def progress(phase: str, done: float, total: float, text: str) -> None:
            if done == total and phase not in ("loading", "report"):
                print(f"    {phase}: {total:g} steps {text}", flush=True)

        overrides = [f"seed={seed}", f"precision={self.precision}", *overrides]
        return run(name, folder, overrides, progress=progress)

    def of_task(self, task: str) -> list[str]:
        setting = TASKS[task]
        given = [f"data.task.task={task}", f"data.task.dir={self.data}"]
        given.append(f"data.task.max_length={setting.max_length}")
        if setting.limit:
            given.append(f"data.task.limit={setting.limit}")
        return given

    def of_text(self, task: str) -> list[str]:
        """General text: of a teacher without any, the task's own sentences."""
        files = [str(path) for path in self.text]
        if TASKS[task].vocabulary:
            files = [str(self._sentences(task))]
        return [f"data.general.text={json.dumps(files)}", "data.general.max_length=128"]

    def steps(self, stage: str, count: float, rate: str, batch: int = BATCH) -> list[str]:
        key = f"stages.{stage}"
        count = max(1, round(self.budget * count / batch))
        given = [f"{key}.steps={count}", f"{key}.batch_size={batch}", f"{key}.warmup=0.1"]
        return [*given, f"{key}.learning_rate={rate}"]

    # -- teachers and students -------------------------------------------------------------------

    def pretrained(self, task: str) -> str:
        vocabulary = TASKS[task].vocabulary
        return str(self._random_bert(vocabulary)) if vocabulary else self.teacher

    def finetuned(self, task: str) -> tuple[str, dict]:
        """The teacher of a task: folder and scores. Its length does not depend on the budget."""
        folder = self.out / "teachers" / task
        rate = "3e-4" if TASKS[task].vocabulary else "1e-4"
        report = self.recipe(
            "finetune",
            folder,
            [f"student.load={self.pretrained(task)}", *self.of_task(task)]
            + [f"stages.task.epochs={TASKS[task].epochs}", f"stages.task.learning_rate={rate}"],
            seed=0,
        )
        return str(folder / "student"), report

    def half(self, task: str) -> list[int]:
        config = transformers.AutoConfig.from_pretrained(self.finetuned(task)[0])
        return list(range(1, config.num_hidden_layers, 2))

    def student(self, source: str, task: str) -> str:
        return f"student={{layers_of: {source}, layers: {self.half(task)}}}"

    def general(self, recipe: str, stage: str, task: str, seed: int, extra: Sequence[str]) -> str:
        """The student of a general stage, shared by all tasks of the same teacher."""
        language = TASKS[task].vocabulary or "en"
        folder = self.out / "general" / recipe / language / f"seed{seed}"
        given = [*self.of_text(task), *self.steps(stage, GENERAL, "3e-4"), *extra]
        with _alone(folder):
            self.recipe(recipe, folder, given, seed)
        return str(folder / "student")

    # -- methods ---------------------------------------------------------------------------------

    def cell(self, task: str, method: str, seed: int) -> dict:
        """The report of a cell."""
        folder = self.out / "cells" / task / method / f"seed{seed}"
        finetuned, _ = self.finetuned(task)
        method_of: Callable = getattr(self, f"_{method.split('-')[0]}")
        return method_of(task, method, seed, folder, finetuned)

    def _tune(self, student: Sequence[str], task: str, seed: int, folder: Path) -> dict:
        given = [*student, *self.of_task(task)]
        return self.recipe(
            "finetune", folder, [*given, *self.steps("task", TASKS[task].examples, "1e-4")], seed
        )

    def _finetune(self, task, method, seed, folder, finetuned) -> dict:
        source = finetuned if method == "finetune-task" else self.pretrained(task)
        given = [f"models.source={{load: {source}}}", self.student("source", task)]
        return self._tune(given, task, seed, folder)

    def _soft(self, task, method, seed, folder, finetuned) -> dict:
        given = [f"teacher={self.teach(finetuned)}", self.student("teacher", task)]
        given += self.of_task(task)
        given += self.steps("task", TASKS[task].examples, "1e-4")
        return self.recipe("soft-label", folder, given, seed)

    def _theseus(self, task, method, seed, folder, finetuned) -> dict:
        count = len(self.half(task))
        given = [f"teacher={finetuned}", *self.of_task(task), f"student.layers={count}"]
        examples = TASKS[task].examples
        given += self.steps("replacing", examples * 2 / 3, "3e-4")
        given += self.steps("successor", examples / 3, "1e-4")
        return self.recipe("theseus", folder, given, seed)

    def _minilm(self, task, method, seed, folder, finetuned) -> dict:
        given = ["stages.assistant.enabled=false", "stages.general.teacher=teacher"]
        return self._relations("minilm", given, task, seed, folder)

    def _minilmv2(self, task, method, seed, folder, finetuned) -> dict:
        # 48 relation heads of base-size teachers are 16 wide; so are these.
        width = transformers.AutoConfig.from_pretrained(finetuned).hidden_size
        given = f"stages.general.losses.relations.relation_heads={width // 16}"
        return self._relations("minilmv2", [given], task, seed, folder)

    def _relations(self, recipe, given, task, seed, folder) -> dict:
        teacher = f"teacher={self.teach(self.pretrained(task))}"
        given = [teacher, self.student("teacher", task), *given]
        student = self.general(recipe, "general", task, seed, given)
        return self._tune([f"student={student}"], task, seed, folder)

    def _latent(self, task: str, seed: int) -> str:
        """TinyBERT's general distillation, which is ERNIE-Tiny's first stage too."""
        pretrained = self.teach(self.pretrained(task))
        given = [f"models.pretrained={pretrained}", self.student("pretrained", task)]
        given += ["stages.intermediate.enabled=false", "stages.prediction.enabled=false"]
        return self.general("tinybert", "general", task, seed, given)

    def _tinybert(self, task, method, seed, folder, finetuned) -> dict:
        given = [f"student={self._latent(task, seed)}", f"models.finetuned={self.teach(finetuned)}"]
        given += ["stages.general.enabled=false", *self.of_task(task)]
        examples = TASKS[task].examples
        given += self.steps("intermediate", examples / 2, "3e-4")
        given += self.steps("prediction", examples / 2, "1e-4")
        return self.recipe("tinybert", folder, given, seed)

    def _ernie(self, task, method, seed, folder, finetuned) -> dict:
        stages = ABLATION[method]
        given = [
            f"models.finetuned={self.teach(finetuned)}",
            *self.of_task(task),
            *self.of_text(task),
        ]
        if "gd" in stages:
            given.append(f"student={self._latent(task, seed)}")
        else:
            source = f"models.source={{load: {self.pretrained(task)}}}"
            given += [source, self.student("source", task)]
        given += [f"stages.{s}.enabled={str(s in stages and s != 'gd').lower()}" for s in
                  ("gd", "ged", "tad", "tsd")]  # fmt: skip
        given += self.steps("ged", GENERAL / 2, "3e-4")
        examples = TASKS[task].examples
        share = 0.5 if "tad" in stages else 1.0
        given += self.steps("tad", examples * 0.5, "3e-4")
        given += self.steps("tsd", examples * share, "1e-4")
        return self.recipe("ernie-tiny", folder, given, seed)

    def _efficientbert(self, task, method, seed, folder, finetuned) -> dict:
        """The student starts from the teacher's layers; gelu and tanh genes of the paper's kind."""
        layers = self.half(task)
        genes = json.dumps(["2x1 down(gelu_erf(up(x)))"] * len(layers))
        options = f"from: pretrained, genes: {genes}, layers: {layers}, ffn_base: 1"
        given = [f"models.pretrained={self.teach(self.pretrained(task))}"]
        given += [f"student={{efficientbert: {{{options}}}}}", "stages.warmup.enabled=false"]
        general = [*given, "stages.task.enabled=false"]
        student = self.general("efficientbert", "general", task, seed, general)
        given = [
            f"student={student}",
            f"models.finetuned={self.teach(finetuned)}",
            *self.of_task(task),
        ]
        given += ["stages.warmup.enabled=false", "stages.general.enabled=false"]
        given += self.steps("task", TASKS[task].examples, "2e-4")
        return self.recipe("efficientbert", folder, given, seed)

    # -- what it makes ---------------------------------------------------------------------------

    def _random_bert(self, vocabulary: str) -> Path:
        """A small BERT of random weights with a published vocabulary."""
        folder = self.out / "teachers" / f"random-{vocabulary}"
        if not (folder / "model.safetensors").exists():
            (file,) = (self.data / vocabulary).glob("bert*vocab.txt")
            tokenizer = transformers.BertTokenizer(str(file))
            sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
            config = transformers.BertConfig(
                vocab_size=len(tokenizer), intermediate_size=1024, **sizes
            )
            torch.manual_seed(0)
            tokenizer.save_pretrained(folder)
            transformers.BertModel(config).save_pretrained(folder)
        return folder

    def _sentences(self, task: str) -> Path:
        from fastffn.data.tasks import load_task

        path = self.out / "text" / f"{task}.txt"
        if not path.exists():
            write_text_atomic(path, "\n".join(load_task(task, self.data).splits["train"].first))
        return path


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- the table -----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the tasks' data")
    add("--text", type=Path, nargs="+", required=True, help="general text")
    add("--teacher", default="sentence-transformers/all-MiniLM-L6-v2")
    add("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    add("--seeds", type=int, nargs="+", default=[0])
    add("--budget", type=float, default=1.0, help="factor of all numbers of steps")
    add("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    add("--out", type=Path, default=Path("runs/quality"))
    options = parser.parse_args()
    bench = Bench(
        options.data, options.text, options.out, options.teacher, options.budget, options.precision
    )
    conditions = _conditions(options)
    known = options.out / "quality.json"
    before = json.loads(known.read_text())["conditions"] if known.exists() else conditions
    for name in ("teacher", "budget", "precision"):
        if before[name] != conditions[name]:
            parser.error(f"{options.out} has cells of {name} {before[name]}: give another --out")
    for seed in options.seeds:
        for task in options.tasks:
            for method in options.methods:
                print(f"{task}: {method}, seed {seed}", flush=True)
                bench.cell(task, method, seed)
                found = {"conditions": conditions, **collected(options.out)}
                write_text_atomic(options.out / "quality.json", json.dumps(found, indent=1) + "\n")
                write_text_atomic(options.out / "table.md", table(found))
    print(table(found))


def collected(out: Path) -> dict:
    """What the finished cells of a folder found."""

    def report(path: Path) -> dict:
        return json.loads((path / "report.json").read_text(encoding="utf-8"))

    found: dict = {"teachers": {}, "cells": []}
    for task in TASKS:
        if not (out / "teachers" / task / "report.json").exists():
            continue
        (found["teachers"][task],) = report(out / "teachers" / task)["metrics"].values()
        for method in METHODS:
            for path in sorted((out / "cells" / task / method).glob("seed*/report.json")):
                cell = report(path.parent)
                (metrics,) = cell["metrics"].values()
                seconds = {stage: x["seconds"] for stage, x in cell["stages"].items()}
                found["cells"].append(
                    {"task": task, "method": method, "seed": cell["seed"], "metrics": metrics}
                    | {"parameters": cell["parameters"], "seconds": seconds}
                )
    return found


def _conditions(options) -> dict:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "commit": commit,
        "device": device,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "teacher": options.teacher,
        "budget": options.budget,
        "precision": options.precision,
        "text files": len(options.text),
        "general sequences": round(options.budget * GENERAL),
        "task examples": {t: round(options.budget * TASKS[t].examples) for t in options.tasks},
        "torch": torch.__version__,
    }


def table(found: dict) -> str:
    """Markdown: a row for each task and method; the task's first metric x 100."""
    lines = [
        "| task | method | runs | score | spread | of the teacher | against finetune |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for task, teacher in found["teachers"].items():
        metric, best = next(iter(teacher.items()))
        lines.append(f"| {task} ({metric}) | teacher | 1 | {100 * best:.1f} | | 100 % | |")
        of_task = [cell for cell in found["cells"] if cell["task"] == task]
        scores: dict[str, list[float]] = {}
        for cell in of_task:
            scores.setdefault(cell["method"], []).append(cell["metrics"][metric])
        plain = statistics.mean(scores["finetune"]) if "finetune" in scores else None
        for method, values in scores.items():
            mean = statistics.mean(values)
            spread = f"{100 * (max(values) - min(values)):.1f}" if len(values) > 1 else ""
            kept = f"{100 * mean / best:.1f} %" if best > 0 else ""
            gain = "" if plain is None else f"{100 * (mean - plain):+.1f}"
            lines.append(
                f"| | {method} | {len(values)} | {100 * mean:.1f} | {spread} | {kept} | {gain} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
