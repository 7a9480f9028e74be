"""`Served`: an exported model, whatever its format, behind one call.

    served = fastffn.serve.load("folder")
    served(input_ids=ids, attention_mask=mask)["logits"]
    served.encode(["a text", "another"])          # logits or sentence vectors [texts, width]

Inputs are checked before anything runs: what is wrong is said in one line, whatever the runtime
would have made of it. Calls from several threads at once are safe.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..distill.teacher import sentence_vectors
from ..errors import UserError
from .interface import SENTENCE, Interface

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Served:
    """A model that was loaded to be run.

    Attributes:
        kind: the format: safetensors, onnx, torch-export or sentence-transformers.
        quantize: "int8" or None.
        folder: where it lies.
        interface: names of inputs and outputs, tokens of a text at most, and more.
        config: of transformers.
        tokenizer: of transformers; None where the folder has none.
        labels: names of the classes of a model with a head for them; else None.
    """

    def __init__(
        self,
        run: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
        kind: str,
        folder: Path,
        interface: Interface,
        config: Any,
        tokenizer: Any = None,
        quantize: str | None = None,
        max_length: int | None = None,
    ):
        self._run = run
        self._max_length = max_length
        self.kind, self.quantize, self.folder = kind, quantize, folder
        self.interface, self.config, self.tokenizer = interface, config, tokenizer

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes, in the order of the logits."""
        if "logits" not in self.interface.outputs or self.task == "masked-lm":
            return None
        return tuple(name for _, name in sorted(self.config.id2label.items()))

    @property
    def task(self) -> str:
        """sequence-classification, regression, token-classification, question-answering, masked-lm,
        or embedding."""
        if "start_logits" in self.interface.outputs:
            return "question-answering"
        if "logits" not in self.interface.outputs:
            return "embedding"
        named = (self.config.architectures or [""])[0]
        if named.endswith("ForMaskedLM"):
            return "masked-lm"
        if named.endswith("ForTokenClassification"):
            return "token-classification"
        return "sequence-classification" if self.config.num_labels > 1 else "regression"

    @property
    def max_length(self) -> int:
        """Tokens that `encode` cuts a text to."""
        limits = [self._max_length, self.interface.positions]
        if self.tokenizer is not None:
            limits.append(self.tokenizer.model_max_length)
        return min((n for n in limits if n is not None and n < 10**9), default=512)

    def __call__(self, **batch: Tensor | np.ndarray | None) -> dict[str, Tensor]:
        """Runs a batch.

        Args:
            **batch: input_ids [batch, length], and if not all are tokens attention_mask (1 at
                tokens); token_type_ids, of models that tell segments apart. Integers, tensors on
                the CPU or arrays.

        Returns:
            Outputs by name, see `interface`.

        Raises:
            UserError: unknown inputs, unequal shapes, texts beyond the model's positions, or ids
                beyond its vocabulary.
        """
        inputs = self._checked(batch)
        empty = inputs["input_ids"].shape[0] == 0
        if empty:  # not every runtime can shape a batch of no texts
            inputs = {name: x.new_zeros(1, x.shape[1]) for name, x in inputs.items()}
        with torch.inference_mode():
            found = self._run(inputs)
        return {name: found[name][:0] if empty else found[name] for name in self.interface.outputs}

    def encode(
        self,
        texts: Sequence[str],
        batch_size: int = 32,
        pairs: Sequence[str] | None = None,
        pooling: str | None = None,
    ) -> Tensor:
        """The vectors of texts: sentence vectors, or logits of a model for classes of texts.

        Args:
            texts: of any length; what is beyond `max_length` tokens is cut off.
            batch_size: texts of one run; those of like length run together.
            pairs: of a model for pairs, the second text of each.
            pooling: "mean" or "cls", of an encoder that does not say how it makes sentence vectors.

        Returns:
            float32 [texts, width], in the order of the texts.

        Raises:
            UserError: no tokenizer, or a model whose outputs are vectors of tokens.
        """
        if self.tokenizer is None:
            raise UserError(f"{self.folder} has no tokenizer: export it with one, or call with ids")
        output, width = self._of_texts(pooling)
        if not len(texts):
            return torch.zeros(0, width)
        given = [list(texts)] if pairs is None else [list(texts), list(pairs)]
        encoded = self.tokenizer(*given, truncation=True, max_length=self.max_length)
        order = np.argsort([len(ids) for ids in encoded["input_ids"]], kind="stable")
        parts = []
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = {
                name: pad_sequence(
                    [torch.tensor(encoded[name][k]) for k in rows],
                    batch_first=True,
                    padding_value=self.interface.pad if name == "input_ids" else 0,
                )
                for name in self.interface.inputs
                if name in encoded
            }
            found = self(**batch)[output]
            if found.dim() == 3:
                found = sentence_vectors(found, batch["attention_mask"], pooling, unit=False)
            parts.append(found.float())
        return torch.cat(parts)[torch.from_numpy(np.argsort(order))]

    def _of_texts(self, pooling: str | None) -> tuple[str, int]:
        """The output that has a vector of each text, or can be pooled to one, and its width."""
        if self.task in ("sequence-classification", "regression"):
            return "logits", self.config.num_labels
        if SENTENCE in self.interface.outputs:
            return SENTENCE, self.config.hidden_size
        if self.task == "embedding" and pooling is not None:
            return "last_hidden_state", self.config.hidden_size
        raise UserError(
            f"{self.folder} makes no vector of a text: export it with pooling, or call it"
        )

    def _checked(self, batch: Mapping[str, Tensor | np.ndarray | None]) -> dict[str, Tensor]:
        """The inputs of the model in its order, int64; a UserError where they do not fit it."""
        given = {name: torch.as_tensor(x) for name, x in batch.items() if x is not None}
        for name, x in given.items():
            if name not in _INPUTS:
                raise UserError(f"{name} is no input: {', '.join(self.interface.inputs)} are")
            if x.is_floating_point() or x.is_complex() or x.dim() != 2:
                kind = str(x.dtype).removeprefix("torch.")
                raise UserError(
                    f"{name} is {kind} {list(x.shape)}: integers [batch, length] are expected"
                )
        if "input_ids" not in given:
            raise UserError("input_ids are missing")
        ids = given["input_ids"]
        for name, x in given.items():
            if x.shape != ids.shape:
                raise UserError(f"{name} is {list(x.shape)} and input_ids are {list(ids.shape)}")
        length, positions = ids.shape[1], self.interface.positions
        if length == 0:
            raise UserError("input_ids: texts of 0 tokens; keep at least one, such as [CLS]")
        if positions is not None and length > positions:
            raise UserError(
                f"input_ids: {length} tokens, the model has {positions} positions; truncate the "
                "text"
            )
        if ids.numel() and not 0 <= ids.min() <= ids.max() < self.interface.vocabulary:
            raise UserError(
                f"input_ids: {int(ids.min())} to {int(ids.max())}, the vocabulary ends at "
                f"{self.interface.vocabulary}; use the model's own tokenizer"
            )
        given.setdefault("attention_mask", torch.ones_like(ids))
        given.setdefault("token_type_ids", torch.zeros_like(ids))
        return {name: given[name].long() for name in self.interface.inputs}
