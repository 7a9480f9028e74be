"""Whether a search earns its cost: found genes against plain and random ones of the same budget.

    python -m bench.search_quality --task sst2 --data DIR --teacher DIR --out runs/search-quality
    python -m bench.search_quality [--text FILES...] --out runs/search-quality-text

For each seed a search by a shipped recipe finds genes. Then every contender takes its slices of the
search's warmed-up supernet, as `student.yaml` of the search does, and is distilled for `--steps`:

    found       the winner
    plain       one gelu unit of the same width in every layer, of the winner's size
    random-k    members of the searched space, that is within its budget, drawn by chance

All are judged on what neither search nor training saw: the task's validation rows (of SST-2 the
file dev.tsv, 6,735 rows that are left out of training here: the 872 of GLUE's dev set are too few
to tell students apart), or the order of similarities of held-out sentences. The same command goes
on with what is missing; quality.json and table.md are written anew after each result.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastffn import distill
from fastffn.data.encode import Encoded, encode_task
from fastffn.data.inputs import model_inputs
from fastffn.data.tasks import load_task
from fastffn.data.text import hold_out, read_documents, stdlib_documents
from fastffn.distill.heads import Head
from fastffn.distill.recipe import Recipe
from fastffn.distill.students import load_model
from fastffn.distill.teacher import DEFAULT_TEACHER, sentence_vectors
from fastffn.evaluate.retention import retention
from fastffn.expr import Gene, gene_cost
from fastffn.files import write_text_atomic
from fastffn.search import engine
from fastffn.search.space import Space

_HELD_OUT = 2000  # sentences that judge on text


@dataclass
class Bench:
    """Choices of the whole bench."""

    out: Path
    teacher: str
    task: str | None
    data: Path | None
    text: Sequence[Path]
    search: Sequence[str]  # overrides
    steps: int
    rate: float
    batch: int
    random: int
    precision: str

    # -- data ------------------------------------------------------------------------------------

    def values(self) -> dict[str, Any]:
        """The data of search and students."""
        if self.task is None:
            return {"general": {"text": str(self._sentences()), "max_length": 64, "limit": 20_000}}
        if self.task != "sst2":
            return {"task": {"task": self.task, "dir": str(self.data), "max_length": 128}}
        folder = next(p for p in (self.data, self.data / "sst2_glue") if (p / "dev.tsv").is_file())
        files = {"train": str(folder / "train.tsv"), "validation": str(folder / "dev.tsv")}
        task = {"name": "sst2", "kind": "classification", "texts": "sentence", "label": "label"}
        task |= {"labels": ["negative", "positive"], **files}
        return {"task": {"task": task, "max_length": 64, "limit": 20_000}}

    def _documents(self):
        documents = read_documents(self.text) if self.text else stdlib_documents()
        return hold_out(documents, 0.1, seed=0)

    def _sentences(self) -> Path:
        """The training part of the text, a document a paragraph."""
        path = self.out / "text.txt"
        if not path.exists():
            train, _ = self._documents()
            parts = ("\n".join(document.sentences) for document in train)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(path, "\n\n".join(parts) + "\n")
        return path

    # -- searches and students -------------------------------------------------------------------

    def found(self, seed: int) -> dict[str, Any]:
        """The report of a search."""
        name, what = ("small", "general") if self.task is None else ("small-task", "task")
        spec = self.values()[what]
        given = [f"data.{what}.{key}={json.dumps(value)}" for key, value in spec.items()]
        given += [f"teacher={self._teach()}", f"precision={self.precision}", f"seed={seed}"]
        folder = self.out / f"seed{seed}" / "search"
        return engine.run(name, folder, [*given, *self.search], progress=_say)

    def _teach(self) -> str:
        dtype = "bfloat16" if self.precision == "bf16" else "float32"
        return f"{{load: {self.teacher}, dtype: {dtype}}}"

    def student(self, seed: int, name: str, genes: Sequence[str]) -> dict[str, float]:
        """The scores of a contender, which is distilled from the search's supernet."""
        folder = self.out / f"seed{seed}"
        trained = next((folder / "search" / "supernets").glob("coarse/student"))
        what = "general" if self.task is None else "task"
        losses: dict[str, Any] = {"hidden": {"layer_map": "uniform"}}
        losses |= {"relations": {"relation_heads": 48}} if self.task is None else {}
        losses |= {"vector": {}} if self.task is None else {"soft_labels": {}}
        stage = {
            **{"name": "final", "student": "student", "data": what, "losses": losses},
            **{
                "steps": self.steps,
                "batch_size": self.batch,
                "learning_rate": self.rate,
                "cache": True,
            },
        }
        dtype = "bfloat16" if self.precision == "bf16" else "float32"
        recipe = Recipe.from_mapping(
            {
                **{"name": "final", "seed": seed, "precision": self.precision},
                "teacher": {"load": self.teacher, "dtype": dtype},
                "models": {"supernet": {"load": str(trained)}},
                "student": {"efficientbert": {"from": "supernet", "genes": list(genes)}},
                **{"data": self.values(), "stages": [stage]},
            }
        )
        report = distill.run(recipe, folder / name)
        if self.task is not None:
            scores = next(iter(report["metrics"].values()))
            return scores | self._agreement(folder / name / "student")
        return self._retention(folder / name / "student")

    def _agreement(self, student: Path) -> dict[str, float]:
        """With the teacher on the validation rows: the divergence from its classes, mean over rows,
        which varies less than accuracy; and how many rows get its class."""
        spec = self.values()["task"]
        data = load_task(spec["task"], spec.get("dir"))
        head = Head(data.task.kind, data.task.labels or ())
        models = [load_model(path, head) for path in (self.teacher, student)]
        encoded = encode_task(
            models[0].tokenizer,
            data.splits["validation"],
            data.task,
            spec["max_length"],
            train=False,
        )
        theirs, ours = (_logits(loaded.model, encoded) for loaded in models)
        same = (theirs.argmax(-1) == ours.argmax(-1)).double().mean()
        divergence = F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")
        return {"divergence": float(divergence), "agreement": float(same)}

    def _retention(self, student: Path) -> dict[str, float]:
        _, held_out = self._documents()
        sentences = [s for document in held_out for s in document.sentences]
        sentences = Random(0).sample(sentences, min(_HELD_OUT, len(sentences)))
        return retention(*(_vectors(path, sentences) for path in (self.teacher, student)))

    def contenders(self, report: dict[str, Any], seed: int) -> dict[str, list[str]]:
        space = Space.from_dict(report["space"])
        rng = Random(f"contenders {seed}")
        random = (space.random(rng).texts for _ in range(self.random))
        return {
            "found": report["genes"],
            "plain": _plain(space, report["best"]["params"]),
            **{f"random-{k}": genes for k, genes in enumerate(random)},
        }


def _plain(space: Space, params: int) -> list[str]:
    """Gelu units of one width, of at most so many parameters."""
    each = (params - space.rest_params) // space.num_layers
    for width in range(space.hidden_size * space.base * 4, 0, -1):
        gene = Gene.parse(f"1x{Fraction(width, space.hidden_size)} down(gelu(up(x)))")
        if gene_cost(gene, space.hidden_size).params <= each:
            return [str(gene)] * space.num_layers
    raise AssertionError("no width is small enough")


@torch.inference_mode()
def _logits(model: torch.nn.Module, encoded: Encoded) -> torch.Tensor:
    """float64 [rows, classes], in the order of the rows' lengths."""
    order = np.argsort(encoded.lengths, kind="stable")
    batches = (encoded.batch(order[k : k + 64]) for k in range(0, len(order), 64))
    return torch.cat([model(**model_inputs(model, batch)).logits.double() for batch in batches])


@torch.inference_mode()
def _vectors(folder: str | Path, sentences: Sequence[str]) -> torch.Tensor:
    loaded = load_model(folder, Head("none"))
    order = sorted(range(len(sentences)), key=lambda k: len(sentences[k]))
    vectors: dict[int, torch.Tensor] = {}
    for start in range(0, len(order), 64):
        numbers = order[start : start + 64]
        batch = loaded.tokenizer(
            [sentences[k] for k in numbers],
            **{"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"},
        )
        hidden = loaded.model(**model_inputs(loaded.model, batch)).last_hidden_state
        rows = sentence_vectors(hidden, batch["attention_mask"], "mean")
        vectors |= dict(zip(numbers, rows, strict=True))
    return torch.stack([vectors[k] for k in range(len(sentences))])


def _say(phase: str, done: float, total: float, text: str) -> None:
    if done == total:
        print(f"    {phase}: {total:g} {text}", flush=True)


def table(results: dict[str, Any]) -> str:
    """Scores by seed; of random genes the median and the range."""
    lines = ["| seed | found | plain | random: median | random: range | found: genes |"]
    lines.append("|---|---|---|---|---|---|")
    for seed, cell in results["seeds"].items():
        scores = {name: one["score"] for name, one in cell["contenders"].items()}
        chance = [score for name, score in scores.items() if name.startswith("random")]
        if not {"found", "plain"} <= scores.keys() or not chance:
            continue
        low, high, middle = min(chance), max(chance), statistics.median(chance)
        genes = ", ".join(f"`{gene}`" for gene in cell["contenders"]["found"]["genes"])
        row = (f"{scores[name]:.4f}" for name in ("found", "plain"))
        lines.append(
            f"| {seed} | {' | '.join(row)} | {middle:.4f} | {low:.4f}–{high:.4f} | {genes} |"
        )
    return "\n".join(lines) + "\n"


def _conditions() -> dict[str, Any]:
    described = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(described, capture_output=True, text=True).stdout.strip()
    return {"date": datetime.date.today().isoformat(), "commit": commit}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.search_quality")
    add = parser.add_argument
    add("--task", help="a task that fastffn knows; none: text, without labels")
    add("--data", type=Path, help="the folder of the task's files")
    add("--text", type=Path, nargs="*", default=[], help="default: the standard library's docs")
    add("--teacher", default=DEFAULT_TEACHER, help="fine-tuned on the task")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--random", type=int, default=5, help="random contenders of each seed")
    add("--steps", type=int, default=600, help="of a contender's distillation")
    add("--batch", type=int, default=32, help="rows of a step")
    add("--rate", type=float, default=3e-4)
    add("--precision", default="fp32", choices=("fp32", "bf16"))
    add("--search", nargs="*", default=[], help="overrides of the search's recipe")
    add("--out", type=Path, required=True)
    given = vars(parser.parse_args())
    seeds = given.pop("seeds")
    given["search"] = tuple(given["search"])
    bench = Bench(**given)
    # No paths: the file is to be shared.
    settings = {key: given[key] for key in given.keys() - {"out", "data", "text", "teacher"}}
    results: dict[str, Any] = {**_conditions(), "settings": settings, "seeds": {}}
    for seed in seeds:
        start = time.monotonic()
        report = bench.found(seed)
        cell: dict[str, Any] = {"contenders": {}}
        cell["search"] = {
            k: report[k] for k in ("stages", "best", "seconds", "machine", "versions")
        }
        for stage in cell["search"]["stages"]:
            del stage["supernet"]
        cell["space"] = report["space"]
        results["seeds"][str(seed)] = cell
        for name, genes in bench.contenders(report, seed).items():
            scores = bench.student(seed, name, genes)
            first = next(iter(scores.values()))
            params = Space.from_dict(report["space"]).rest_params
            hidden = report["space"]["hidden_size"]
            params += sum(gene_cost(Gene.parse(gene), hidden).params for gene in genes)
            said = {"score": first, "scores": scores, "params": params, "genes": list(genes)}
            cell["contenders"][name] = said
            print(f"seed {seed} {name}: {first:.4f}, {time.monotonic() - start:.0f} s", flush=True)
            write_text_atomic(bench.out / "quality.json", json.dumps(results, indent=1) + "\n")
            write_text_atomic(bench.out / "table.md", table(results))


if __name__ == "__main__":
    main()
