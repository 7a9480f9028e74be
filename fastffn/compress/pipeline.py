"""Compresses an encoder from end to end: what `fastffn demo` runs.

    text -> teacher outputs -> warm-up of a supernet -> search -> distillation of the winner
         -> baselines -> measurement -> report

The teacher runs over the text once; all later phases read what it said. Each phase leaves its
result in the run directory, so that a run which is interrupted at any moment (Ctrl-C, SIGTERM, a
power cut) goes on where it was when the same call is made again, and ends with the same weights.
"""

import time
from typing import Any

import torch

from fastffn.compress import baselines, measure, phases, schedule, student
from fastffn.compress.corpus import Corpus, read
from fastffn.compress.options import Options
from fastffn.compress.run import Progress, Run
from fastffn.distill.cache import TeacherCache
from fastffn.distill.objective import Objective
from fastffn.distill.teacher import DEFAULT_TEACHER, Teacher, load_teacher
from fastffn.errors import UserError
from fastffn.memory import freed_memory_kept
from fastffn.rundir import RunDirectory

# Tried on the demonstration: hidden states teach most, the vector alone least.
WEIGHTS = {"hidden": 3.0, "relations": 1.0, "vector": 1.0}
_MAX_TOKENS = 128  # of a sentence
_RELATION_HEADS = 12
_RESULTS = ("student", "report.json", "report.md")
_PHASES = ("text", "teacher", "warmup", "search", "distil", "baselines", "measure")
_MEASURED = (
    *("size_ratio", "size_ratio_total", "speedup_b1", "speedup_b32", "length"),
    *("retention", "start"),
)


def run(options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """Runs what is not finished yet and returns the report.

    Args:
        options: see there.
        progress: called as progress(phase, done, total, text) while a phase runs; the unit of
            `done` and `total` is the phase's own.

    Returns:
        The report as plain data (see docs/design.md). A directory that holds a finished run with
        the same options gives its report again without any work.

    Raises:
        UserError: bad input, before any long work.
        KeyboardInterrupt: passed on; the directory can be resumed by the same call.
    """
    progress = progress or (lambda phase, done, total, text: None)
    directory = RunDirectory(
        options.out, options.identity(), options.fresh, contents=_RESULTS, free=("text",)
    )
    if directory.finished:
        progress("measure", 1, 1, f"finished before: {options.out} (--fresh starts over)")
        return directory.report
    with freed_memory_kept():
        made = _prepare(options, directory, progress)
        directory.phase("warmup", lambda: phases.warm_up(made))
        found = directory.phase("search", lambda: phases.search(made))
        genes = found["genes"]
        directory.phase("distil", lambda: phases.distillation(made, genes))
    # Latency is what a service sees, whose allocator nobody tuned.
    measured = directory.phase("measure", lambda: measure.measurement(made, genes))
    with freed_memory_kept():
        against = directory.phase(
            "baselines",
            lambda: baselines.run_all(made, genes, measure.judged(measured)),
        )
    report = _report(made, measured, against)
    directory.finish(report, keep=("teacher",) if options.keep_cache else ())
    return report


def _prepare(options: Options, directory: RunDirectory, progress: Progress) -> Run:
    """Checks everything that can be wrong, then has the teacher's outputs computed."""
    start = time.monotonic()
    plan = schedule.check(options.plan)
    progress("text", 0, 2, "teacher")
    teacher = load_teacher(options.teacher)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    teacher.model.to(device)
    shape = student.choose(teacher.model, options)
    progress("text", 1, 2, "text")
    corpus: Corpus | None = None

    def text() -> dict[str, Any]:
        nonlocal corpus
        corpus = read(options)
        directory.decide(**plan)  # the first thing written: the input is sound
        if "sentences" not in directory.plan:
            directory.decide(sentences=_affordable(corpus, teacher, options))
        return {"digest": corpus.digest(), "seconds": time.monotonic() - start}

    known = directory.phase("text", text)
    corpus = corpus or read(options)
    if corpus.digest() != known["digest"]:
        raise UserError(
            f"the text changed since the run in {options.out} began: start over with --fresh"
        )
    corpus = corpus.limited(directory.plan["sentences"], options.seed)
    progress("text", 2, 2, f"{len(corpus.train):,} sentences, {len(corpus.held_out):,} held out")
    objective = Objective(
        shape.layer_map,
        **WEIGHTS,
        relation_heads=_heads(shape.hidden_size),
        pooling=teacher.pooling,
    )

    def compute() -> TeacherCache:
        return TeacherCache.open_or_compute(
            directory.work / "teacher",
            teacher,
            corpus.sentences,
            hidden_layers=[layer for _, layer in shape.layer_map],
            max_length=min(_MAX_TOKENS, teacher.model.config.max_position_embeddings),
            progress=lambda done, total: progress("teacher", done, total, f"{done:,} tokens"),
        )

    cache: TeacherCache | None = None

    def outputs() -> dict[str, Any]:
        nonlocal cache
        cache = compute()
        tokens = int(cache.lengths[corpus.numbers("train")].sum())
        return {"tokens": tokens, "fingerprint": cache.fingerprint}

    known = directory.phase("teacher", outputs)
    cache = cache or compute()
    if cache.fingerprint != known["fingerprint"]:
        raise UserError(
            f"the teacher changed since the run in {options.out} began: start over with --fresh"
        )
    return Run(options, directory, progress, teacher, corpus, cache, shape, objective)


def _affordable(corpus: Corpus, teacher: Teacher, options: Options) -> int:
    """Training sentences whose teacher outputs can be computed in the teacher's share of time."""
    tokens = teacher.tokenizer(corpus.sentences[:1000], truncation=True, max_length=_MAX_TOKENS)
    mean = sum(map(len, tokens["input_ids"])) / len(tokens["input_ids"])
    seconds = schedule.TEACHER * 60 * options.minutes
    number = seconds * schedule.teacher_tokens_per_second(teacher) / mean
    judged = len(corpus.validation) + len(corpus.held_out)
    return min(len(corpus.train), max(schedule.LEAST["sentences"], int(number) - judged))


def _heads(hidden_size: int) -> int:
    """Relation heads: twelve where they divide the width, else the most below that do."""
    return max(n for n in range(1, _RELATION_HEADS + 1) if hidden_size % n == 0)


def _report(run: Run, measured: dict[str, Any], against: dict[str, Any]) -> dict[str, Any]:
    """The report of a run whose phases are all finished."""
    directory, options, corpus = run.directory, run.options, run.corpus
    found = directory.result("search")
    seconds = directory.seconds()
    effect = against["embedding_effect"]
    return {
        "teacher": {
            "name": options.teacher or DEFAULT_TEACHER,
            "origin": run.teacher.origin,
            **measured["teacher"],
        },
        "student": {
            "name": "student",
            **measured["student"],
            "genes": found["genes"],
            "layers": list(run.shape.layers),
            "embedding_size": options.embedding_size,
            "path": "student",
        },
        **{name: measured[name] for name in _MEASURED},
        "baselines": against["baselines"],
        "search": {
            "candidates": len(found["trials"]),
            "best_gene": found["genes"],
            "seconds": seconds["search"],
            "trials": found["trials"],
        },
        "curves": {name: directory.result(name)["curve"] for name in ("warmup", "distil")},
        "phases": {name: seconds[name] for name in _PHASES},
        **({"embedding_effect": effect} if effect else {}),
        "data": {
            "train_sentences": len(corpus.train),
            "held_out_sentences": len(corpus.held_out),
            "train_tokens": directory.result("teacher")["tokens"],
        },
        "plan": directory.plan,
        "machine": measure.machine(),
        "seconds": round(sum(seconds.values()), 1),
    }
