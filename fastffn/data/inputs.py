"""Which tensors of a batch a model is given."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def model_inputs(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs out of a batch: ids, mask, and token types for models that tell segments apart.

    Some tokenizers make token types for models that have none, or a single one (RoBERTa).
    """
    inputs = {name: batch[name] for name in _INPUTS if name in batch}
    if getattr(getattr(model, "config", None), "type_vocab_size", 0) < 2:
        inputs.pop("token_type_ids", None)
    return inputs
