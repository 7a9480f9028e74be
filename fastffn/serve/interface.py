"""What an exported model takes and gives, and the module that is exported: `Plain`.

    input_ids, attention_mask[, token_type_ids]  int64 [batch, length]
        -> a dict of tensors, float32:
           logits                    of models with a head [batch, classes], for a class of each
                                     token [batch, length, classes]
           start_logits, end_logits  of question answering [batch, length]
           last_hidden_state         of encoders [batch, length, width]
           sentence_embedding        of encoders that are known to pool [batch, width]
           pooler_output             of other encoders that have it [batch, width]

An exported graph has no optional arguments, so they are settled here: token types exist where the
model tells segments apart. Every format gives the same outputs under the same names.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distill.students import positions
from ..distill.teacher import sentence_vectors
from ..errors import UserError

_HEADS = ("logits", "start_logits", "end_logits")
SENTENCE = "sentence_embedding"
LENGTH = 512  # tokens of a probe at most, of models that have no limit


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of a model.

    Attributes:
        inputs, outputs: names, in order.
        positions: tokens of a text at most; None: no limit.
        vocabulary: ids are below it.
        pad: id of padding.
        pooling: "mean" or "cls" of encoders whose sentence vectors are known, else None.
        normalize: sentence vectors have length 1.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    positions: int | None
    vocabulary: int
    pad: int
    pooling: str | None = None
    normalize: bool = False

    @staticmethod
    def of(model: nn.Module, pooling: str | None = None, normalize: bool = False) -> "Interface":
        """The interface of a model of transformers, found by its signature and by a first run.

        Args:
            pooling: of an encoder without a head, how it makes sentence vectors, where the model
                does not say so itself.
            normalize: to length 1.

        Raises:
            UserError: it is no encoder of tokens, or pooling of a model with a head.
        """
        config = getattr(model, "config", None)
        words = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        name = type(model).__name__
        if config is None or not isinstance(words, nn.Embedding):
            raise UserError(
                f"{name} is no encoder of tokens: models of transformers are exported that take "
                "input_ids, such as BERT or EfficientBERT, and not what is made of them"
            )
        if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
            raise UserError(f"{name} decodes: encoders are exported")
        inputs = ("input_ids", "attention_mask")
        takes = inspect.signature(model.forward).parameters
        if getattr(config, "type_vocab_size", 0) >= 2 and "token_type_ids" in takes:
            inputs += ("token_type_ids",)
        pad = getattr(config, "pad_token_id", None)
        base = getattr(model, "base_model", model)
        shape = {
            "inputs": inputs,
            "positions": positions(base) or getattr(config, "max_position_embeddings", None),
            "vocabulary": words.num_embeddings,
            "pad": 0 if pad is None else pad,
        }
        probe = on_device(random_batch(Interface(outputs=(), **shape), [3, 2]), model)
        with evaluating(model):
            found = model(**probe, return_dict=True)
        if heads := tuple(key for key in _HEADS if found.get(key) is not None):
            if pooling is not None or normalize:
                raise UserError(f"{name} has a head: pooling is of encoders without one")
            return Interface(outputs=heads, **shape)
        if found.get("last_hidden_state") is None:
            raise UserError(f"{name} gives {', '.join(found)}: nothing that is known here")
        pooling = pooling or getattr(config, "sentence_pooling", None)
        if pooling not in (None, "mean", "cls"):
            raise UserError(f"pooling {pooling!r} is unknown: choose mean or cls")
        if normalize and pooling is None:
            raise UserError("normalize is of sentence vectors: say pooling, mean or cls")
        outputs = ("last_hidden_state",)
        if pooling is not None:
            outputs += (SENTENCE,)
        elif found.get("pooler_output") is not None:
            outputs += ("pooler_output",)
        return Interface(outputs=outputs, pooling=pooling, normalize=normalize, **shape)

    @property
    def longest(self) -> int:
        """Tokens of the longest probe."""
        return min(self.positions or LENGTH, LENGTH)


class Plain(nn.Module):
    """A model with the arguments and outputs of its interface and no others."""

    def __init__(self, model: nn.Module, interface: Interface):
        super().__init__()
        self.model = model
        self.interface = interface

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Tensors [batch, length] -> outputs by name, see the module's docstring."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        found = self.model(**inputs, return_dict=True)
        outputs = {}
        for name in self.interface.outputs:
            if name == SENTENCE:
                pooling, unit = self.interface.pooling, self.interface.normalize
                outputs[name] = sentence_vectors(found[0], attention_mask, pooling, unit)
            else:
                outputs[name] = found[name]
        return outputs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model evaluates, without gradients; then each part is as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def random_batch(interface: Interface, lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Random texts of these lengths, padded at their ends to the longest."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(interface.vocabulary, shape, generator=generator)
    if interface.vocabulary > 1:  # RoBERTa numbers positions by what is no padding
        ids[ids == interface.pad] = (interface.pad + 1) % interface.vocabulary
    mask = (torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    batch = {
        "input_ids": torch.where(mask.bool(), ids, interface.pad),
        "attention_mask": mask,
    }
    if "token_type_ids" in interface.inputs:
        batch["token_type_ids"] = torch.randint(2, shape, generator=generator) * mask
    return batch


def on_device(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The batch where the model's weights are."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def probes(interface: Interface) -> list[dict[str, Tensor]]:
    """Batches that an export is checked on: of one token, ragged, and as long as can be."""
    longest = interface.longest
    shapes = [[1], [min(2, longest)], [min(7, longest), 1, min(3, longest)]]
    shapes += [[min(k, longest) for k in (16, 9, 2, 16, 5)], [longest, max(1, longest // 2)]]
    return [random_batch(interface, shape, seed) for seed, shape in enumerate(shapes)]


def of_tokens(outputs: Mapping[str, Any], attention_mask: Tensor) -> dict[str, Tensor]:
    """The outputs at real tokens: what stands at padding is nobody's, and differs."""
    real = attention_mask.cpu().bool()
    chosen = {}
    for name, output in outputs.items():
        output = torch.as_tensor(output).cpu()
        if name in ("start_logits", "end_logits"):
            output = torch.where(real, output, 0)
        chosen[name] = output[real] if output.dim() == 3 else output
    return chosen


def difference(
    found: Mapping[str, Any], expected: Mapping[str, Any], attention_mask: Tensor
) -> float:
    """The largest difference of an output, over the largest value of that output if beyond 1.

    At real tokens only. Infinite where one is NaN.
    """
    found, expected = (of_tokens(outputs, attention_mask) for outputs in (found, expected))
    worst = 0.0
    for name, right in expected.items():
        right = right.double()
        gap = (found[name].double() - right).abs().max()
        scaled = gap / right.abs().max().clamp(min=1)
        worst = max(worst, scaled.nan_to_num(nan=torch.inf, posinf=torch.inf).item())
    return worst
