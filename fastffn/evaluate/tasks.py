"""A model's scores on a split of a task.

evaluate(model, encode_task(tokenizer, data.splits["validation"], data.task, 128, train=False),
         data, "validation")   ->   {"accuracy": 0.91}
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fastffn.data.encode import Encoded
from fastffn.data.inputs import model_inputs
from fastffn.data.qa import qa_scores
from fastffn.data.tasks import Task, TaskData
from fastffn.data.windows import SpanReader
from fastffn.errors import UserError
from fastffn.evaluate.metrics import METRICS


class NotFinite(UserError):
    """A model's outputs are NaN or infinite."""


_Model = nn.Module | Callable[..., Mapping[str, Tensor]]


def evaluate(
    model: _Model, encoded: Encoded, data: TaskData, split: str, batch_size: int = 64
) -> dict[str, float]:
    """Computes the task's metrics, where the model's parameters are, in inference mode.

    Rows run in order of their length. The model's training mode is as before in the end.

    Args:
        model: gives logits [rows, classes] ([rows, 1] of regression), or of qa start_logits and
            end_logits [rows, length]. A module, or a function with the model's `config`, such as
            `fastffn.serve.Served`.
        encoded: that split, by `encode_task` with train=False.

    Returns:
        metric -> value, in the order of the task's metrics.

    Raises:
        UserError: rows that are not those of the split, logits that do not fit the task or (a
            `NotFinite`) are not finite.
    """
    task, examples = data.task, data.splits[split]
    qa = task.kind == "qa"
    if qa and encoded.windows is None:
        raise UserError(f"task {task.name}: encode split {split} for evaluation, with train=False")
    count = int(encoded.windows.example.max(initial=-1)) + 1 if qa else len(encoded)
    if count != len(examples) or not count:
        raise UserError(
            f"task {task.name}: {count} examples were encoded, split {split} has {len(examples)}"
        )
    order = np.argsort(encoded.lengths, kind="stable")
    batches = [order[k : k + batch_size] for k in range(0, len(order), batch_size)]
    training = isinstance(model, nn.Module) and model.training
    if training:
        model.eval()
    try:
        if not qa:
            predictions = _predict(model, encoded, batches, task)
            labels = np.asarray(examples.labels)
            return {name: METRICS[name](predictions, labels) for name in task.metrics}
        reader = SpanReader(encoded.windows)
        for numbers in batches:
            output = _forward(model, encoded, numbers)
            reader.read(numbers, _finite(output["start_logits"]), _finite(output["end_logits"]))
    finally:
        if training:
            model.train()
    values = qa_scores(reader.answers(examples), examples)
    return {name: values[name] for name in task.metrics}


def _predict(model: _Model, encoded: Encoded, batches: list[np.ndarray], task: Task) -> np.ndarray:
    """Classes int64 [rows], or scores float64 [rows]."""
    classes = task.kind == "classification"
    width = len(task.labels) if classes else 1
    predictions = np.zeros(len(encoded), np.int64 if classes else np.float64)
    for numbers in batches:
        logits = _finite(_forward(model, encoded, numbers)["logits"])
        if logits.shape != (len(numbers), width):
            raise UserError(
                f"task {task.name} needs {width} logits a row, the model gives {logits.shape[-1]}: "
                "load it with a head of this task"
            )
        predictions[numbers] = logits.argmax(axis=1) if classes else logits[:, 0]
    return predictions


@torch.inference_mode()
def _forward(model: _Model, encoded: Encoded, numbers: np.ndarray):
    device = next(model.parameters()).device if isinstance(model, nn.Module) else "cpu"
    inputs = model_inputs(model, encoded.batch(numbers))
    return model(**{name: value.to(device) for name, value in inputs.items()})


def _finite(logits: Tensor) -> np.ndarray:
    if not logits.isfinite().all():
        raise NotFinite("the model's outputs are not finite: its weights are broken")
    return logits.float().cpu().numpy()
