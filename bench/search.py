"""What a search costs: candidates per minute, proposals, memory.

    python -m bench.search --out FILE.json [--parts candidates proposals memory] [--threads 1]

    candidates   The same candidates, trained and judged in turn, in random order, in one process:
                 fastffn's modules, the same in eager torch, and that compiled by torch.compile
                 for each candidate anew. One-shot judging of as many beside it, with and without
                 sharing what consecutive candidates have in common
    proposals    1,000 of each method, with all checks
    memory       resident memory over 2,000 candidates, trained for two steps each

Models are of random weights and real sizes: a teacher of 6 layers of 384 (all-MiniLM-L6-v2's), a
supernet of 3, a task of two classes on invented words. Speed does not depend on what they say.
"""

import argparse
import datetime
import gc
import json
import platform
import random
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from fastffn import distill
from fastffn.expr import Gene
from fastffn.expr.genes import Z1, Z2, ZG, X
from fastffn.files import write_text_atomic
from fastffn.layers import FFN
from fastffn.ops import reference
from fastffn.search.evaluation import Trained, distillation, evaluation, layers_for
from fastffn.search.oneshot import SharedPrefixes
from fastffn.search.proposals import METHODS, Evaluated, proposal
from fastffn.search.recipe import SearchRecipe
from fastffn.search.space import Space

from .harness import keep_freed_memory

WORDS = [f"w{k}" for k in range(2000)]
SPACE = Space(
    384,
    3,
    stacks=(1, 2),
    ratios=("1/4", "1/2", "3/4", "1", "5/4", "3/2", "2"),
    params=(800_000, 1_300_000),
)


class Eager(nn.Module):
    """The weights of an `FFN` in plain torch."""

    def __init__(self, ffn: FFN):
        super().__init__()
        self.units, self.gene, self.dropout = ffn.units, ffn.gene, ffn.dropout
        self.width = ffn.width

    def forward(self, x: Tensor) -> Tensor:
        parts = self.gene.segments
        for unit in self.units:
            p = reference.elementwise(parts.prologue, {X: x})
            inputs = {Z1: unit.up(p), X: x[..., : self.width]}
            if unit.gate is not None:
                inputs[ZG] = unit.gate(p)
            a = reference.elementwise(parts.middle, inputs)
            y = reference.elementwise(parts.epilogue, {Z2: unit.down(a), X: x})
            x = unit.norm(x + F.dropout(y, self.dropout, self.training))
        return x


class EagerTrained(Trained):
    """Candidates with plain modules."""

    def cut(self, genes: Sequence[Gene]) -> nn.Module:
        candidate = super().cut(genes)
        for layer in candidate.base_model.encoder.layer:
            layer.ffn = Eager(layer.ffn)
        return candidate


class CompiledTrained(EagerTrained):
    """These, each FFN compiled: what stands around them is the same in all contenders."""

    def cut(self, genes: Sequence[Gene]) -> nn.Module:
        torch.compiler.reset()  # a search meets a new function each time; nothing may be reused
        candidate = super().cut(genes)
        for layer in candidate.base_model.encoder.layer:
            layer.ffn.forward = torch.compile(layer.ffn.forward, dynamic=True)
        return candidate


def files(folder: Path, rows: int = 1200, sizes: dict[str, int] | None = None) -> dict[str, str]:
    """A random teacher with a head for two classes, and a task."""
    rng = random.Random(0)
    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    sizes = {
        **{"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
        **(sizes or {}),
    }
    config = transformers.BertConfig(
        vocab_size=30_522, num_attention_heads=12, id2label={0: "low", 1: "high"}, **sizes
    )
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    for split in ("train", "validation"):
        lines = ["sentence\tlabel"]
        for _ in range(rows):
            words = " ".join(rng.choices(WORDS, k=rng.randint(4, 40)))  # as in SST-2
            lines.append(f"{words}\t{rng.choice(('low', 'high'))}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {name: str(folder / f"{name}.tsv") for name in ("train", "validation")}


def recipe(folder: Path, steps: int, task: dict[str, str], precision: str = "fp32") -> SearchRecipe:
    losses = {"hidden": {"layer_map": "uniform"}, "soft_labels": {}}
    stage = {"data": "task", "losses": losses, "batch_size": 32, "learning_rate": 3e-4}
    own = {"name": "bench", "kind": "classification", "texts": "sentence", "label": "label"}
    own |= {"labels": ["low", "high"], **task}
    score = {"metric": "accuracy", "data": "task", "rows": 256}
    search = {"trials": 1, "score": score}
    return SearchRecipe.from_mapping(
        {
            "name": "bench",
            "precision": precision,
            "teacher": {"load": str(folder / "teacher")},
            "models": {
                "supernet": {
                    "supernet": {"from": "teacher", "layers": 3, "max_stack": 2, "max_width": 768}
                }
            },
            "data": {"task": {"task": own, "max_length": 64}},
            "stages": [
                {**stage, "name": "warmup", "student": "supernet", "steps": 2, "subnetworks": 4},
                {**stage, "name": "proxy", "student": "candidate", "steps": steps, "cache": True},
            ],
            "space": {"stacks": [1, 2], "ratios": ["1/2", 1, 2]},
            "search": [
                {**search, "name": "coarse", "supernet": "warmup", "train": "proxy"},
                {**search, "name": "fine", "freeze": "functions"},
            ],
        }
    )


def made(folder: Path, steps: int, precision: str = "fp32", sizes: dict[str, int] | None = None):
    """Evaluations of a recipe whose supernet is warmed up: trained, one-shot."""
    plan = recipe(folder, steps, files(folder, sizes=sizes), precision)
    distill.run(distillation(plan, ["warmup"]), folder / "warm-up")
    supernet = folder / "warm-up" / "student"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [evaluation(plan, stage, supernet, folder / "work", device) for stage in plan.search]


def candidates(
    folder: Path, steps: int, count: int, compiled: int, precision: str
) -> dict[str, Any]:
    """Seconds of each candidate and contender; the first `compiled` are compiled too."""
    trained, oneshot = made(folder, steps, precision)
    arguments = (trained.made, trained.stage, trained.work, trained.device)
    contenders = {"fastffn": trained, "eager": EagerTrained(*arguments)}
    contenders["compile"] = CompiledTrained(*arguments)
    rng = random.Random(0)
    genes = [SPACE.random(rng).genes for _ in range(count)]
    qualities: dict[str, list[float]] = {name: [] for name in contenders}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    list(trained(genes[0])), list(contenders["eager"](genes[0]))  # allocates
    for number, each in enumerate(genes):
        order = [name for name in contenders if name != "compile" or number < compiled]
        rng.shuffle(order)
        for name in order:
            start = time.perf_counter()
            (quality,) = contenders[name](each)
            times[name].append(time.perf_counter() - start)
            qualities[name].append(quality)
        print(
            f"candidate {number}", {k: f"{v[-1]:.2f} s" for k, v in times.items() if v}, flush=True
        )
    found: dict[str, Any] = {
        "steps": steps,
        "precision": precision,
        "seconds": times,
        "qualities": qualities,
        "per_minute": {name: 60 / statistics.median(each) for name, each in times.items()},
    }
    ours = times["fastffn"]
    for name in ("eager", "compile"):
        pairs = zip(times[name], ours, strict=False)
        found[f"{name} / fastffn"] = statistics.median(theirs / own for theirs, own in pairs)
    found["oneshot"] = _oneshot(oneshot, sorted(genes, key=lambda each: [str(g) for g in each]))
    return found


def _oneshot(evaluate, genes) -> dict[str, Any]:
    """Candidates per minute judged as they are, in turn with and without sharing."""
    # As a search's last stage meets them: functions of one winner, the shapes of the first layers
    # the same for many.
    rng = random.Random(1)
    shapes = ("1x1/2", "1x1", "2x1/2", "1x2", "2x1")
    texts = sorted(
        [f"{rng.choice(shapes[:2])} down(gelu(up(x)))"]
        + [f"{rng.choice(shapes)} down(gelu(up(x)))" for _ in range(2)]
        for _ in genes
    )
    supernet = evaluate.supernet
    times: dict[str, list[float]] = {"shared": [], "apart": []}
    for each in texts:
        each = [Gene.parse(text) for text in each]
        start = time.perf_counter()
        shared = evaluate(each)
        times["shared"].append(time.perf_counter() - start)
        supernet.set_genes(each, layers_for(each, supernet))
        start = time.perf_counter()
        apart = evaluate.score(supernet)
        times["apart"].append(time.perf_counter() - start)
        if shared != apart:
            raise SystemExit(f"sharing changes the quality: {shared}, {apart}")
    assert isinstance(evaluate._shared, SharedPrefixes)
    rates = {name: 60 / statistics.mean(each) for name, each in times.items()}
    saved = evaluate._shared.saved / evaluate._shared.blocks
    return {"per_minute": rates, "blocks_saved": saved, "seconds": times}


def proposals(count: int = 1000) -> dict[str, float]:
    """Seconds for so many proposals of each method, over a history of 200."""
    found = {}
    for name in METHODS:
        space = SPACE
        if name in ("tpe", "nsga2"):
            functions = tuple(str(gene.expr) for gene in SPACE.plain()[0].genes)
            space = Space.from_dict(SPACE.to_dict() | {"functions": functions})
        rng = random.Random(0)
        history = []
        for _ in range(200):
            candidate = space.random(rng)
            history.append(Evaluated(candidate, rng.random() - candidate.params / 1e7))
        method = proposal(name, space)
        start = time.perf_counter()
        for _ in range(count):
            space.candidate(method.propose(history, rng).genes)
        found[name] = time.perf_counter() - start
        print(f"{count} proposals of {name}: {found[name]:.1f} s", flush=True)
    return found


def memory(folder: Path, count: int) -> dict[str, Any]:
    """MiB of resident memory after every hundredth candidate; a tiny model, two steps each."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 6, "intermediate_size": 96}
    small = Space(48, 3, stacks=(1, 2), ratios=("1/2", "1", "2"))
    trained, oneshot = made(folder, 2, sizes=sizes)
    rng = random.Random(0)
    resident = []
    for number in range(count + 1):
        if number % 100 == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(round(pages * resource.getpagesize() / 2**20, 1))
            print(f"{number} candidates: {resident[-1]} MiB", flush=True)
        genes = small.random(rng).genes
        list(trained(genes))
        oneshot([Gene.parse(f"{g.stack}x{g.ratio} down(gelu(up(x)))") for g in genes])
    return {"candidates": count, "every": 100, "resident_mib": resident}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.search")
    add = parser.add_argument
    parts = ("candidates", "proposals", "memory")
    add("--out", type=Path, required=True)
    add("--parts", nargs="+", choices=parts, default=parts)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--steps", type=int, nargs="+", default=[20, 100], help="of a candidate's training")
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="of candidates")
    add("--count", type=int, default=12, help="candidates")
    add("--compiled", type=int, default=3, help="of them compiled")
    add("--candidates", type=int, default=2000, help="of the memory's part")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    # What a search compiles is new each time: nothing may come from an earlier run either.
    torch._inductor.config.force_disable_caches = True
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    gpu = torch.cuda.is_available()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or "CPU",
        "threads": given.threads,
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }
    for part in given.parts:
        with tempfile.TemporaryDirectory() as folder:
            if part == "candidates":
                results[part] = []
                for steps in given.steps:
                    place = Path(folder) / str(steps)
                    place.mkdir()
                    found = candidates(place, steps, given.count, given.compiled, given.precision)
                    results[part].append(found)
            else:
                results[part] = (
                    proposals() if part == "proposals" else memory(Path(folder), given.candidates)
                )
        write_text_atomic(given.out, json.dumps(results, indent=1) + "\n")
    print(json.dumps(_short(results), indent=1))


def _short(results: dict[str, Any]) -> dict[str, Any]:
    """Without the single times."""
    short = dict(results)
    if "candidates" in short:
        keep = ("steps", "precision", "per_minute", "eager / fastffn", "compile / fastffn")
        short["candidates"] = [
            {key: each[key] for key in keep} | {"oneshot": each["oneshot"]["per_minute"]}
            for each in short["candidates"]
        ]
    return short


if __name__ == "__main__":
    main()
