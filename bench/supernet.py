"""What a supernet's step costs with four sub-networks against a step with one.

    python -m bench.supernet --out FILE.json [--rounds 15] [--threads 1] [--cases minilm]
                             [--device cpu] [--batch-size 16] [--length 64]

A step is the teacher's pass (live), or its outputs at hand (cached), the sub-networks, the losses,
one backward and AdamW. In turn, in random order, in one process:

    four       largest, smallest and two random ones, as `StageModule` runs them
    apart      the same without anything shared but the teacher, as separate forwards
    largest    the largest alone
    random     one of the random ones alone, another in each round

Reported are medians and the ratios of four to the others. Weights are random, sizes real:

    minilm          6 x 384 (all-MiniLM-L6-v2); supernet 3 x 384, two units of up to 768; relations
                    and hidden states
    efficientbert   12 x 768 (BERT-base); EfficientBERT's supernet, 6 x 540 with four units of up to
                    540; its warm-up losses: attention scores, hidden states, embeddings

A case whose losses and gradients are not those of the separate forwards is refused.
"""

import argparse
import datetime
import itertools
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from fastffn.distill.reading import read
from fastffn.distill.stage_module import StageModule, sizes
from fastffn.distill.subnetworks import Sandwich, SubNetwork
from fastffn.distill.terms import TERMS
from fastffn.files import write_text_atomic
from fastffn.models import EfficientBertConfig, EfficientBertModel

from .harness import keep_freed_memory

COUNT = 4
VOCABULARY = 30522
Work = Callable[[], None]


class Case(NamedTuple):
    """Sizes, and losses with their options."""

    teacher: dict[str, int]
    supernet: dict[str, object]
    losses: dict[str, dict[str, object]]


CASES = {
    "minilm": Case(
        {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
        {
            "hidden_size": 384,
            "num_hidden_layers": 3,
            "genes": ["1x2 down(gelu(up(x)))"] * 3,
            "supernet": {"max_stack": 2, "max_width": 768},
            "embedding_size": None,
            "trigram": False,
        },
        {"relations": {}, "hidden": {}},
    ),
    "efficientbert": Case(
        {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
        {"supernet": {"max_stack": 4, "max_width": 540}},
        {
            "scores": {"masked": "zero"},
            "hidden": {"embeddings": True, "projection": "shared"},
        },
    ),
}


class Step:
    """One case in one precision: its contenders.

    Args:
        case: of CASES.
        rows, length: of the batch, whose texts are between half as long and as long.
        device: "cpu" or "cuda".
        precision: "fp32" or "bf16", of teacher and autocast.
        live: the teacher runs in each step.
    """

    def __init__(self, case: Case, rows: int, length: int, device: str, precision: str, live: bool):
        torch.manual_seed(0)
        self.device, self.precision = device, precision
        config = transformers.BertConfig(num_attention_heads=12, **case.teacher)
        self.teacher = transformers.BertModel(config).to(device).eval().requires_grad_(False)
        self.supernet = EfficientBertModel(EfficientBertConfig(**case.supernet)).to(device)
        built = {
            name: TERMS[name](**options).build(sizes(self.supernet), sizes(self.teacher))
            for name, options in case.losses.items()
        }
        self.sandwich = Sandwich(self.supernet, COUNT, seed=0)
        self.module = StageModule({"supernet": self.supernet}, {"supernet": built}).to(device)
        self.batch = _batch(rows, length, device)
        self.live, self.known = live, self._known()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-6, fused=True)

    def works(self) -> dict[str, Work]:
        """Contender -> one step of it."""
        steps = itertools.count()
        return {
            "four": lambda: self._step(lambda: self._together(next(steps))),
            "apart": lambda: self._step(lambda: self._apart(self.sandwich.at(next(steps)))),
            "largest": lambda: self._step(lambda: self._apart([self.sandwich.largest])),
            "random": lambda: self._step(lambda: self._apart(self.sandwich.at(next(steps))[2:3])),
        }

    def check(self) -> None:
        """Raises an AssertionError if sharing changes the losses or the gradients."""
        self.module.eval()  # no dropout
        found = []
        for losses in (self._together(0), self._apart(self.sandwich.at(0))):
            total = sum(losses.values())
            gradients = torch.autograd.grad(total, list(self.module.parameters()))
            found.append((total.detach(), *gradients))
        self.module.train()
        largest = max(gradient.abs().max().item() for gradient in found[0][1:])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * largest)

    def _step(self, losses: Callable[[], dict[str, Tensor]]) -> None:
        if self.live:
            self.known = self._known()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            values = losses()
        sum(values.values()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.inference_mode()
    def _known(self) -> dict[str, object]:
        """What the losses read of the teacher."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            return read(self.teacher, self.batch, self.module.teacher_reads, stop=True)

    def _together(self, step: int) -> dict[str, Tensor]:
        self.module.sandwich = self.sandwich
        return self.module(self.batch, self.known, step)

    def _apart(self, networks: list[SubNetwork]) -> dict[str, Tensor]:
        self.module.sandwich = None
        values: dict[str, Tensor] = {}
        for network in networks:
            self.supernet.set_genes(*network)
            for name, value in self.module(self.batch, self.known, 0).items():
                values[name] = values.get(name, 0) + value / len(networks)
        return values


def _batch(rows: int, length: int, device: str) -> dict[str, Tensor]:
    ids = torch.randint(1000, VOCABULARY, (rows, length))
    ends = torch.randint(length // 2, length + 1, (rows, 1))
    ends[0] = length
    mask = (torch.arange(length) < ends).long()
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def measured(works: dict[str, Work], rounds: int, device: str) -> dict[str, float]:
    """Contender -> milliseconds, the median over rounds in which each runs once."""

    def seconds(work: Work) -> float:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for work in works.values():
        seconds(work)
    found: dict[str, list[float]] = {name: [] for name in works}
    order = list(works)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            found[name].append(seconds(works[name]))
    return {name: round(1e3 * statistics.median(times), 2) for name, times in found.items()}


def conditions(device: str) -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.supernet", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", metavar="FILE.json", required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's choice")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    result = conditions(arguments.device) | {"rounds": arguments.rounds, "cases": []}
    kinds = itertools.product(arguments.cases, arguments.precisions, ("live", "cached"))
    for name, precision, teacher in kinds:
        step = Step(
            CASES[name],
            arguments.batch_size,
            arguments.length,
            arguments.device,
            precision,
            teacher == "live",
        )
        step.check()
        times = measured(step.works(), arguments.rounds, arguments.device)
        ratios = {rival: round(times["four"] / times[rival], 3) for rival in list(times)[1:]}
        result["cases"].append(
            {
                "case": f"{name} {precision} {teacher} teacher",
                "batch": [arguments.batch_size, arguments.length],
                "median_ms": times,
                "ratio": ratios,
            }
        )
        print(result["cases"][-1], flush=True)
        write_text_atomic(arguments.out, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
