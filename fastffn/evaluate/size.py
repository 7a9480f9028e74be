"""Counts what an encoder weighs: parameters, and multiply-accumulates (MACs) of a forward.

MACs are counted by running one sentence and summing the matrix products that happen, attention's
included. Why not a formula over the configuration: each family would need its own, and a searched
model has other FFNs in each layer.
"""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count(model: nn.Module, length: int = 128) -> dict[str, int]:
    """Size of an encoder.

    Args:
        model: an encoder with `get_input_embeddings()`; shared parameters count once.
        length: tokens of the one sentence that MACs are counted for.

    Returns:
        "params", "params_without_word_embeddings" (without the table of word vectors; what
        projects them to the hidden width stays), "macs".
    """
    params = sum(parameter.numel() for parameter in model.parameters())
    words = model.get_input_embeddings().weight
    return {
        "params": params,
        "params_without_word_embeddings": params - words.numel(),
        "macs": _macs(model, length, words.device),
    }


def _macs(model: nn.Module, length: int, device: torch.device) -> int:
    input_ids = torch.zeros(1, length, dtype=torch.long, device=device)
    training = model.training
    model.eval()
    try:
        # The counter knows plain products everywhere; of fused attention not each backend's.
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    finally:
        model.train(training)
    return counter.get_total_flops() // 2
