"""What comes out: sizes, latencies and retention of student and teacher, and the machine."""

from typing import Any

import torch

from fastffn.compress import phases, schedule
from fastffn.compress.run import Run
from fastffn.compress.student import LENGTH
from fastffn.evaluate import latency, size

BATCHES = (1, 32)
_ROUNDS = 20


def measurement(run: Run, genes: list[str]) -> dict[str, Any]:
    """Measures teacher and student beside each other.

    Returns:
        The report's teacher, student, retention, start, ratios and length.
    """
    student = phases.load_student(run)
    teacher = run.teacher.model
    models = {"teacher": teacher, "student": student}
    length = min(LENGTH, *(model.config.max_position_embeddings for model in models.values()))
    seconds = 0.4 * schedule.MEASURE * 60 * run.options.minutes / len(BATCHES)
    timed = {}
    for number, batch in enumerate(BATCHES):
        text = f"latency, batch {batch}"
        run.progress("measure", number, len(BATCHES) + 1, text)
        found = latency.measure(models, (batch,), length, _ROUNDS, seconds, run.options.seed)
        timed[batch] = {name: found[name][batch] for name in models}
    run.progress("measure", len(BATCHES), len(BATCHES) + 1, "retention")
    figures: dict[str, Any] = {}
    for name, model in models.items():
        latencies = {f"latency_ms_b{batch}": timed[batch][name]["ms"] for batch in BATCHES}
        figures[name] = {**size.count(model, length), **latencies}
    start = phases.new_student(run, genes, run.options.embedding_size)
    number = len(run.corpus.held_out)
    result = {
        **figures,
        "retention": {
            **phases.judge(run, student, "held_out"),
            "sentences": number,
            "pairs": min(20_000, number * (number - 1) // 2),
        },
        "start": phases.judge(run, start, "held_out"),
        "size_ratio": _ratio(figures, "params_without_word_embeddings"),
        "size_ratio_total": _ratio(figures, "params"),
        "length": length,
    }
    for batch in BATCHES:
        result[f"speedup_b{batch}"] = _ratio(figures, f"latency_ms_b{batch}")
    run.progress("measure", len(BATCHES) + 1, len(BATCHES) + 1, "")
    return result


def judged(measured: dict[str, Any]) -> dict[str, float]:
    """The student's figures in the form of a baseline's."""
    sizes = ("params", "params_without_word_embeddings")
    return {
        **{name: measured["retention"][name] for name in ("spearman", "top1", "top10")},
        **{name: measured["student"][name] for name in sizes},
    }


def machine() -> dict[str, Any]:
    """Where this was measured."""
    from fastffn import doctor

    found = doctor.report()
    return {
        "cpu": found["cpu"],
        "cores": found["cores"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "isa": found["extension"]["isa"],
    }


def _ratio(figures: dict[str, dict], name: str) -> float:
    return figures["teacher"][name] / figures["student"][name]
