"""Measures latency of several encoders fairly: interleaved in one run, in inference mode.

A machine's speed drifts: clocks, heat, neighbours. Each round therefore runs every model once, in a
rotating order, and what is reported is the median over rounds, with the quartiles as its spread.
Ratios of such medians hold where single figures do not.
"""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn


def measure(
    models: Mapping[str, nn.Module],
    batch_sizes: Sequence[int] = (1, 32),
    length: int = 128,
    rounds: int = 20,
    seconds: float = 20.0,
    seed: int = 0,
) -> dict[str, dict[int, dict[str, float]]]:
    """Latency of each model at each batch size, full batches of random tokens without padding.

    Args:
        models: name -> encoder with `config.vocab_size`; put in evaluation mode for the run.
        length: tokens of each sentence.
        rounds: at most so many measured forwards of each model and batch size, after one or
            more that are not measured.
        seconds: time for one batch size; rounds end early (but not before the fifth).

    Returns:
        name -> batch size -> {"ms": median, "low": lower, "high": upper quartile, "rounds"}, in
        milliseconds per forward.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = min(model.config.vocab_size for model in models.values())
    was_training = {name: model.training for name, model in models.items()}
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in models}
    try:
        for model in models.values():
            model.eval()
        for size in batch_sizes:
            input_ids = torch.randint(vocabulary, (size, length), generator=generator)
            for name, times in _interleaved(models, input_ids, rounds, seconds).items():
                low, median, high = statistics.quantiles(times, n=4, method="inclusive")
                results[name][size] = {
                    "ms": median,
                    "low": low,
                    "high": high,
                    "rounds": len(times),
                }
    finally:
        for name, model in models.items():
            model.train(was_training[name])
    return results


def _interleaved(models, input_ids, rounds, seconds) -> dict[str, list[float]]:
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    inputs = {name: input_ids.to(_device(model)) for name, model in models.items()}
    masks = {name: torch.ones_like(ids) for name, ids in inputs.items()}
    with torch.inference_mode():
        for _ in range(2):  # first calls allocate, pick kernels and warm the caches
            for name in names:
                models[name](input_ids=inputs[name], attention_mask=masks[name])
        end = time.perf_counter() + seconds
        for k in range(rounds):
            if k >= 5 and time.perf_counter() > end:
                break
            for name in names[k % len(names) :] + names[: k % len(names)]:
                _synchronise(inputs[name].device)
                start = time.perf_counter()
                models[name](input_ids=inputs[name], attention_mask=masks[name])
                _synchronise(inputs[name].device)
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
