"""Judging candidate after candidate on one supernet without computing common prefixes again.

    with SharedPrefixes(supernet) as shared, torch.inference_mode():
        for genes in sorted(candidates):
            supernet.set_genes(genes)
            for k, batch in enumerate(batches):
                with shared.batch(k):
                    outputs = supernet(**batch)

What layer i computes depends on the genes of the layers up to it, and what its attention computes
only on those *below* it. So after a first candidate no other computes the first attention, and one
that differs from the candidate before it in layer i alone computes the FFN of layer i and what
follows. Sorted by their texts, candidates with long common prefixes stand side by side. Outputs
have the same bits as without.

Kept for each batch: what the FFN of each layer gets, [B, T, H] each, of the last candidate; in all
(tokens with padding) x layers x H x bytes of a number: 1,000 texts of 128 tokens, 3 layers of 384
in float32 are 590 MB. `max_bytes` bounds it; what does not fit is computed each time.

Why not the layers' outputs too: they would double the memory to spare, in a candidate that was
judged before, nothing that a study asks for twice.
"""

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..expr import Gene


class _Attended(NamedTuple):
    """A layer of the candidate before: its index, gene, and what its FFN got [B, T, H]."""

    index: int
    gene: Gene
    state: Tensor


class SharedPrefixes:
    """Context manager: within it a supernet starts where a candidate differs from the one before.

    It works below any head. Layers whose inside somebody looks at (hooks, as `fastffn.capture`
    makes them), and all above the first such, run as ever; so do all layers where hidden states or
    attentions are asked for. Weights that change, by an optimiser or `load_state_dict`, are noticed
    and nothing is taken over from before. A block that ends leaves the model as it was, and a later
    one goes on with what is known; the states live as long as this object, or until `clear`.

    Args:
        model: an EfficientBert supernet with or without a head, in evaluation mode.
        max_bytes: of the states that are kept; None: all.

    Attributes:
        blocks: attentions and FFNs that the forwards in `batch` blocks consisted of so far.
        saved: how many of them were not computed.
        bytes: kept now.

    Raises:
        UserError: the model is no supernet.
    """

    def __init__(self, model: nn.Module, max_bytes: int | None = None):
        base = getattr(model, "base_model", model)
        if getattr(base.config, "supernet", None) is None:
            raise UserError("SharedPrefixes: the model is no supernet; its genes never change")
        self.encoder, self.config = base.encoder, base.config
        self.max_bytes = float("inf") if max_bytes is None else max_bytes
        self.blocks = self.saved = self.bytes = 0
        self._weights = list(model.parameters())
        self._versions: list[int] = []
        self._seen: dict[Hashable, list[_Attended]] = {}
        self._batch: Hashable = None
        self._inside = False

    def __enter__(self) -> "SharedPrefixes":
        self.encoder.forward = self._forward
        return self

    def __exit__(self, *_: object) -> None:
        del self.encoder.forward

    def clear(self) -> None:
        """Forgets the candidate before and frees its states."""
        self._seen.clear()
        self.bytes = 0

    @contextlib.contextmanager
    def batch(self, key: Hashable) -> Iterator[None]:
        """Within the block a forward is one of this batch: same key, same inputs."""
        self._batch, self._inside = key, True
        try:
            yield
        finally:
            self._inside = False

    def _forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: object
    ) -> Tensor:
        """`EfficientBertEncoder.forward`, from the last attention that is known."""
        if not self._inside:
            return type(self.encoder).forward(self.encoder, hidden_states, attention_mask, **kwargs)
        self._check_mode()
        layers = self.encoder.walk()
        genes = [(index, layer.ffn.gene) for index, layer in layers]
        unread = self._unread([layer for _, layer in layers], kwargs)
        seen = self._seen.setdefault(self._batch, [])
        if seen and seen[0].state.shape != hidden_states.shape:
            raise UserError(
                f"batch {self._batch}: was {list(seen[0].state.shape)} and is "
                f"{list(hidden_states.shape)}; give other inputs another key"
            )
        known = _known(genes[:unread], seen)
        self._shorten(seen, known)
        if known:
            (index, gene), state = genes[known - 1], seen[-1].state
            seen[-1] = _Attended(index, gene, state)
            hidden_states = layers[known - 1][1].ffn(state)
        for place in range(known, len(layers)):
            layer = layers[place][1]
            if place < unread:
                state, _ = layer.attention(hidden_states, attention_mask, **kwargs)
                if len(seen) == place:
                    self._keep(seen, _Attended(*genes[place], state))
                hidden_states = layer.ffn(state)
            else:
                hidden_states = layer(hidden_states, attention_mask, **kwargs)
        self.blocks += 2 * len(layers)
        self.saved += max(0, 2 * known - 1)
        return hidden_states

    def _check_mode(self) -> None:
        if self.encoder.training or torch.is_grad_enabled():
            raise UserError(
                "SharedPrefixes: judging needs model.eval() and torch.inference_mode(): dropout "
                "and gradients belong to one forward alone"
            )
        versions = [weight._version for weight in self._weights if not weight.is_inference()]
        if versions != self._versions:
            self.clear()
            self._versions = versions

    def _unread(self, layers: Sequence[nn.Module], asked: dict[str, object]) -> int:
        """How many of the leading layers nobody looks into."""
        for name in ("output_hidden_states", "output_attentions"):
            wanted = asked.get(name)
            if getattr(self.config, name, False) if wanted is None else wanted is not False:
                return 0
        return next((k for k, layer in enumerate(layers) if _is_hooked(layer)), len(layers))

    def _shorten(self, seen: list[_Attended], length: int) -> None:
        self.bytes -= sum(layer.state.nbytes for layer in seen[length:])
        del seen[length:]

    def _keep(self, seen: list[_Attended], layer: _Attended) -> None:
        if self.bytes + layer.state.nbytes <= self.max_bytes:
            seen.append(layer)
            self.bytes += layer.state.nbytes


def _known(genes: Sequence[tuple[int, Gene]], seen: Sequence[_Attended]) -> int:
    """How many leading attentions are those of the candidate before."""
    count = 0
    for (index, gene), before in zip(genes, seen, strict=False):
        if index != before.index:
            break
        count += 1
        if gene != before.gene:
            break
    return count


def _is_hooked(layer: nn.Module) -> bool:
    """Whether a forward hook sees into the layer; transformers' recorders stay for ever and are
    idle unless outputs are asked for."""
    return any(
        not getattr(hook, "__module__", "").startswith("transformers.")
        for module in layer.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )
