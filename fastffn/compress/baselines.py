"""The honest baselines: what each part of the method brings at an equal budget of training.

    searched        the student as it is, trained on this budget
    no_search       plain gelu FFNs of the same number of parameters, otherwise the same
    no_relations    the searched student without the attention-relation loss
    vectors_only    the searched student with the cosine of sentence vectors as its only loss

All start from the teacher's weights, not from the supernet: that was warmed up with all losses,
which the last two are to do without. All see the same sentences in the same order for the same
number of steps.

The short budget is what the time of the run leaves; the student, which had far more, is not
comparable to it, so `searched` is trained again. The full one is the student's own (warm-up and
distillation together), and `searched` is the student, which came by way of the supernet.
"""

from dataclasses import dataclass
from typing import Any

from fastffn.compress import phases, schedule
from fastffn.compress.run import Run
from fastffn.compress.student import plain, plain_of_size
from fastffn.distill.objective import PARTS, Objective
from fastffn.evaluate.size import count
from fastffn.search.space import Candidate


@dataclass(frozen=True)
class Contender:
    """One baseline: what it differs in."""

    genes: list[str]
    objective: Objective
    embedding_size: int | None


def contenders(run: Run, genes: list[str]) -> dict[str, Contender]:
    """The baselines of a winner."""
    space, size = run.shape.space, run.options.embedding_size
    winner: Candidate = space.candidate(genes)
    width = plain_of_size(winner.params, space.rest_params, len(genes), space.hidden_size)
    equal = [plain(width, space.hidden_size)] * len(genes)
    others = [part for part in PARTS if part != "vector"]
    return {
        "searched": Contender(genes, run.objective, size),
        "no_search": Contender(equal, run.objective, size),
        "no_relations": Contender(genes, phases.without(run, "relations"), size),
        "vectors_only": Contender(genes, phases.without(run, *others), size),
    }


def run_all(run: Run, genes: list[str], student: dict[str, float]) -> dict[str, Any]:
    """Trains and judges the baselines, each once: an interrupted run keeps those it has.

    Args:
        genes: the winner's.
        student: the distilled student's retention and size.

    Returns:
        {"baselines": as in the report, "embedding_effect": the same or None, "seconds"}.
    """
    full = run.options.ablate
    steps = _steps(run)
    field = contenders(run, genes)
    variants = _embeddings(run, genes)
    if full:
        del field["searched"]
    names = [*field, *variants]
    results = {}
    for position, (name, contender) in enumerate((field | variants).items()):
        key = f"baseline {name}"
        results[name] = run.directory.kept(key)
        if results[name] is None:
            result = _train(run, name, contender, steps, position, len(names))
            results[name] = run.directory.keep(key, result)
    results = {name: dict(result) for name, result in results.items()}
    seconds = {name: result.pop("seconds") for name, result in results.items()}
    if full:
        results["searched"] = dict(student)
    per_run = sum(seconds.values()) / len(seconds)
    budget = {"steps": steps, "seconds": per_run, "what": "full" if full else "short"}
    effect = _effect(run, results, variants, steps)
    results["no_search"]["gene"] = field["no_search"].genes[0]
    order = ("searched", "no_search", "no_relations", "vectors_only")
    return {
        "baselines": {"budget": budget, **{name: results[name] for name in order}},
        "embedding_effect": effect,
        "seconds": sum(seconds.values()),
    }


def _steps(run: Run) -> int:
    if run.options.ablate:
        return run.plan["warmup_steps"] + run.plan["distil_steps"]
    if "baseline_steps" not in run.plan:
        each = run.seconds_left() / (4 + len(_embeddings(run, [])))
        cost = run.directory.kept("seconds per step")
        if cost is None:
            cost = run.seconds_per_step(phases.load_student(run))
        run.decide(baseline_steps=schedule.steps("baseline_steps", each, cost))
    return run.plan["baseline_steps"]


def _train(run: Run, name: str, contender: Contender, steps: int, position: int, of: int):
    student = phases.new_student(run, contender.genes, contender.embedding_size)
    result = phases.train(
        run,
        student,
        steps,
        objective=contender.objective,
        output_dir=run.work / "baselines" / name,
        progress=run.steps("baselines", position * steps, of * steps, name.replace("_", " ")),
    )
    sizes = count(student, 8)
    del sizes["macs"]
    return {**phases.judge(run, student, "held_out"), **sizes, "seconds": result.seconds}


def _embeddings(run: Run, genes: list[str]) -> dict[str, Contender]:
    """The student with the other kind of word embedding, where the run is to show its effect."""
    size, hidden = run.options.embedding_size, run.shape.hidden_size
    if size is not None:
        return {"own embeddings": Contender(genes, run.objective, None)}
    if run.options.ablate:
        return {"factorised": Contender(genes, run.objective, max(1, hidden // 3))}
    return {}


def _effect(run: Run, results: dict, variants: dict, steps: int) -> dict[str, Any] | None:
    if not variants:
        return None
    ((name, contender),) = variants.items()
    size = run.options.embedding_size or contender.embedding_size
    factorised, own = ("searched", name) if name == "own embeddings" else (name, "searched")
    return {
        f"factorised to {size}": results[factorised],
        f"the teacher's own, {run.shape.hidden_size}": results[own],
        "note": f"the same student, {steps} steps each from the teacher's weights",
    }
