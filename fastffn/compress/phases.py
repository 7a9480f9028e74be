"""The phases between the teacher's outputs and the student: warm-up, search, distillation.

    warm-up        the supernet learns; at each step it runs the largest genes, the smallest, or
                   two random shapes of the space in turn (the sandwich rule, 1903.05134)
    search         each candidate takes its slices of the supernet, learns for a few steps, and is
                   judged by the rank correlation of similarities on the validation text
    distillation   the winner goes on from the supernet's weights

The warm-up runs plain gelu functions only: sharing weights works among widths and stacks, but a
weight that serves a sigmoid and a relu in turn serves neither (EfficientBERT, 2109.07222, warms up
the same way). Functions are judged after steps of their own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from torch import nn

from fastffn.compress import schedule
from fastffn.compress.run import Run
from fastffn.compress.student import LENGTH, plain
from fastffn.distill.objective import Objective
from fastffn.distill.trainer import TrainResult, distil
from fastffn.distill.vectors import encode
from fastffn.evaluate.retention import retention
from fastffn.expr import Gene
from fastffn.models import EfficientBertModel, extract, from_teacher, supernet_from_teacher
from fastffn.rundir import atomic_directory
from fastffn.search.coarse_to_fine import Stage, coarse_to_fine
from fastffn.search.ledger import verdict
from fastffn.search.space import frozen

RATE = 2e-3  # peak learning rate at a hidden size of 384; Adam's best falls as width grows
EMBEDDINGS = "embeddings."  # candidates keep them: most of their cost, little to gain in few steps
CHECKPOINT_SECONDS = 30.0  # what an interruption costs at most
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def new_student(run: Run, genes: Sequence[Gene | str], embedding_size: int | None) -> nn.Module:
    """A student that starts from the teacher's weights alone."""
    student = from_teacher(
        run.teacher.model,
        list(genes),
        run.shape.layers,
        embedding_size,
        samples=run.samples,
        sentence_pooling=run.teacher.pooling,
        **_NO_DROPOUT,
    )
    return student.to(run.device)


def train(run: Run, student: nn.Module, steps: int, **options: Any) -> TrainResult:
    """Distils a student on the training text; `options` as in `distil`."""
    return distil(
        student,
        run.cache,
        options.pop("objective", run.objective),  # a baseline has its own
        steps,
        numbers=run.numbers("train"),
        batch_size=run.batch_size,
        learning_rate=RATE * min(1.0, 384 / run.shape.hidden_size),
        seed=run.options.seed,
        checkpoint_seconds=CHECKPOINT_SECONDS,
        **options,
    )


def judge(run: Run, student: nn.Module, part: str) -> dict[str, float]:
    """The student's retention on a part of the text."""
    numbers = run.numbers(part)
    vectors = encode(student, run.cache, numbers, run.teacher.pooling)
    return retention(run.cache.vectors(numbers), vectors, seed=run.options.seed)


def sandwich(run: Run) -> Callable[[int], list[str]]:
    """What the supernet runs at each step: a function of the number alone, so that it resumes."""
    shape = run.shape
    narrowest = int(min(shape.space.ratios) * shape.hidden_size)
    widest = plain(shape.max_width, shape.hidden_size).replace("1x", f"{shape.max_stack}x", 1)
    count = len(shape.layers)
    largest, smallest = [widest] * count, [plain(narrowest, shape.hidden_size)] * count
    shapes = frozen(shape.space, shape.space.candidate(shape.plain), "functions")

    def genes(step: int) -> list[str]:
        if step % 4 < 2:
            return (largest, smallest)[step % 4]
        return shapes.random(Random(f"{run.options.seed} {step}")).texts

    return genes


def warm_up(run: Run) -> dict[str, Any]:
    """Trains the supernet and leaves it in work/supernet."""
    shape = run.shape
    supernet = supernet_from_teacher(
        run.teacher.model,
        shape.max_stack,
        shape.max_width,
        shape.layers,
        run.options.embedding_size,
        samples=run.samples,
        sentence_pooling=run.teacher.pooling,
        **_NO_DROPOUT,
    ).to(run.device)
    genes = sandwich(run)
    supernet.set_genes(genes(0))
    if "warmup_steps" not in run.plan:
        cost = run.seconds_per_step(supernet, genes=genes)
        share = schedule.WARMUP * run.seconds_left()
        run.decide(warmup_steps=schedule.steps("warmup_steps", share, cost))
    result = train(
        run,
        supernet,
        run.plan["warmup_steps"],
        genes=genes,
        output_dir=run.work / "warmup",
        progress=run.steps("warmup"),
    )
    with atomic_directory(run.work / "supernet") as folder:
        supernet.save_pretrained(folder)
    return {"seconds": result.seconds, "curve": result.curve, "frozen": result.frozen}


def load_supernet(run: Run) -> nn.Module:
    return EfficientBertModel.from_pretrained(run.work / "supernet").to(run.device)


def search(run: Run) -> dict[str, Any]:
    """Searches the genes; candidates of an interrupted search are not judged again."""
    supernet, space = load_supernet(run), run.shape.space
    if not {"candidates", "candidate_steps"} <= run.plan.keys():
        probe = extract(supernet, run.shape.plain)
        cost = run.seconds_per_step(probe, freeze=(EMBEDDINGS,))
        left = run.seconds_left() / (1 - schedule.WARMUP)
        count, steps = schedule.candidates(schedule.SEARCH * left, cost)
        run.decide(candidates=count, candidate_steps=steps)
    total, steps = run.plan["candidates"], run.plan["candidate_steps"]
    fine = total // 3
    stages = [Stage("coarse", total - fine, (total - fine) // 2)]
    if fine:
        stages.append(Stage("fine", fine, freeze="functions"))

    def evaluate(genes: tuple[Gene, ...]) -> float:
        candidate = extract(supernet, genes)
        train(run, candidate, steps, freeze=(EMBEDDINGS,), warmup=0.2)
        if not all(p.isfinite().all() for p in candidate.parameters()):
            return math.nan
        return judge(run, candidate, "validation")["spearman"]

    def progress(stage: str, record: dict[str, Any], done: int, of: int) -> None:
        finished = done + (total - fine if stage == "fine" else 0)
        run.progress("search", finished, total, f"{stage}: {verdict(record, 3)}")

    result = coarse_to_fine(
        space,
        evaluate,
        run.work / "search",
        stages,
        seeds=[space.candidate(run.shape.plain), *space.plain()[:2]],
        seed=run.options.seed,
        progress=progress,
    )
    run.progress("search", total, total, f"best {result.best['quality']:.3f}")
    trials = [
        {
            **{key: record[key] for key in ("genes", "params", "quality", "stage")},
            "macs": record["macs"] * LENGTH,
        }
        for record in result.candidates
    ]
    return {"genes": [str(gene) for gene in result.genes], "trials": trials}


def distillation(run: Run, genes: list[str]) -> dict[str, Any]:
    """Trains the winner and leaves it, with its tokenizer, in student/."""
    student = extract(load_supernet(run), genes)
    if "distil_steps" not in run.plan:
        share = (1 - schedule.BASELINES) * run.seconds_left()
        cost = run.seconds_per_step(student)
        run.directory.keep("seconds per step", cost)
        run.decide(distil_steps=schedule.steps("distil_steps", share, cost))
    result = train(
        run,
        student,
        run.plan["distil_steps"],
        output_dir=run.work / "distil",
        progress=run.steps("distil"),
    )
    save(run, student)
    return {"seconds": result.seconds, "curve": result.curve}


def save(run: Run, student: nn.Module) -> None:
    """Writes student/ whole or not at all."""
    config = run.teacher.model.config  # fine-tuning wants the dropout that distillation does not
    for name in _NO_DROPOUT:
        setattr(student.config, name, getattr(config, name))
    with atomic_directory(run.student_path) as folder:
        student.save_pretrained(folder)
        run.teacher.tokenizer.save_pretrained(folder)


def load_student(run: Run) -> nn.Module:
    return EfficientBertModel.from_pretrained(run.student_path).to(run.device)


def without(run: Run, *losses: str) -> Objective:
    """The run's objective with some losses left out."""
    return replace(run.objective, **dict.fromkeys(losses, 0.0))
