"""Sentence vectors of a model over a cache's sentences."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastffn.distill.cache import TeacherCache
from fastffn.distill.teacher import sentence_vectors


@torch.inference_mode()
def encode(
    model: nn.Module,
    cache: TeacherCache,
    numbers: Sequence[int],
    pooling: str = "mean",
    batch_size: int = 64,
) -> Tensor:
    """Encodes sentences in evaluation mode, those of like length together.

    Args:
        model: an encoder; keeps its mode.
        numbers: sentences of the cache.

    Returns:
        float32 [sentences, width] in the order of `numbers`, of length 1, on the CPU.
    """
    numbers = np.asarray(numbers)
    order = np.argsort(cache.lengths[numbers], kind="stable")
    device, training = next(model.parameters()).device, model.training
    parts = []
    try:
        model.eval()
        for start in range(0, len(order), batch_size):
            batch = cache.batch(numbers[order[start : start + batch_size]], ())
            batch = {name: value.to(device) for name, value in batch.items()}
            hidden = model(**batch).last_hidden_state
            parts.append(sentence_vectors(hidden, batch["attention_mask"], pooling).float().cpu())
    finally:
        model.train(training)
    return torch.cat(parts)[torch.from_numpy(np.argsort(order))]
