"""A model's layers as csrc's `Encoder`: weights packed once for many products, one call a batch.

What goes in: post-norm layers of any width with plain attention, with or without biases, gated or
not, with any gene; weights that layers share (ALBERT) are packed once. What does not, and is
refused with the reason, runs by torch (`optimize`): norms before the products, rotary or
disentangled positions, windows, activations without a primitive of ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..expr import Gene
from ..expr.genes import Z1, Z2, ZG, X
from ..layers import FFN
from ..layers.ffn import is_plain
from ..models.architectures import ALL, Encoder
from ..ops import backend
from ..ops.ffn_plan import Segment, plan

_SOURCES = {Z1: 0, ZG: 1, X: 2, Z2: 3}  # csrc/encoder.h
_NONE = (None, [])


class NotPackable(UserError):
    """The model has something that csrc's encoder does not compute."""


@dataclass(frozen=True)
class _Block:
    """One unit of a feed-forward part."""

    up: nn.Linear
    gate: nn.Linear | None
    down: nn.Linear
    norm: nn.LayerNorm
    text: str


@dataclass(frozen=True)
class Embeddings:
    """The tables that a token's vector is the sum of, and what is done with the sum.

    Attributes:
        words, positions, segments: [rows, width]; segments None: there are none.
        before: the projection of words; with `trigram` of a word and its neighbours.
        norm: of the sum.
        after: the projection of the normalised sum.
        by_words: position numbers count tokens that are no padding, from this number on
            (RoBERTa); None: they count columns from 0.
    """

    words: Tensor
    positions: Tensor
    segments: Tensor | None
    norm: nn.LayerNorm
    before: nn.Linear | None = None
    trigram: bool = False
    after: nn.Linear | None = None
    by_words: int | None = None


class Packed:
    """csrc's Encoder of a model, with the tensors that it does not copy.

    Args:
        base: an encoder without head, of float weights on the CPU.
        precision: of the weights: "float32", "bfloat16" or "int8".

    Attributes:
        encoder: csrc's.
        embeddings: the tables, or None where only hidden states can be given.
        hidden: H.
        relative: its scores have a bias of relative positions, to be given to `run` (MPNet).

    Raises:
        NotPackable: with the reason.
    """

    def __init__(self, base: nn.Module, precision: str = "float32"):
        module = backend.cpp()[0]
        if module is None:
            raise NotPackable(f"csrc is not there: {backend.cpp()[1]}")
        if not module.multiplies(precision):
            raise NotPackable(f"{module.isa()} on this processor does not multiply {precision}")
        layers = Encoder(base, ALL)
        block = layers.attention_block(0)
        self._keep: list[Tensor] = []
        self.relative = base.config.model_type == "mpnet"
        self.hidden = block.output.out_features
        if block.heads * block.head_size != self.hidden:
            raise NotPackable("the heads together are of another width than the hidden states")
        self.encoder = module.Encoder(self.hidden, block.heads, block.head_size, precision)
        for layer in range(len(layers.layers)):
            self._add_layer(layers, layer)
        for layer in _repeated(base, len(layers.layers)):
            self.encoder.repeat_layer(layer)
        self._keep.clear()  # weights are packed
        self.embeddings = embeddings_of(base)
        if self.embeddings is not None:
            self._set_embeddings(self.embeddings)

    def _add_layer(self, layers: Encoder, layer: int) -> None:
        block = layers.attention_block(layer)
        if block.pre_norm:
            raise NotPackable("its norms stand before the products")
        if block.bias is not None and not self.relative:
            raise NotPackable(block.bias)
        if block.packed is not None:
            raise NotPackable("its query, key and value are one product")
        units = [self._unit(unit) for unit in _units(layers, layer)]
        projections = [self._linear(x) for x in (block.query, block.key, block.value)]
        norm = self._norm(block.norm)
        self.encoder.add_layer(projections, self._linear(block.output), block.scale, norm, units)

    def _unit(self, block: _Block):
        parts = plan(block.text)
        first = [self._linear(x) for x in (block.up, block.gate) if x is not None]
        segments = (_segment(x) for x in (parts.prologue, parts.middle, parts.epilogue))
        width = block.down.in_features
        return first, self._linear(block.down), width, *segments, self._norm(block.norm)

    def _linear(self, layer: nn.Linear) -> tuple[int, int, int]:
        if not is_plain(layer, nn.Linear):
            raise NotPackable(f"a {type(layer).__name__} stands where a plain nn.Linear was")
        return self._address(layer.weight), self._address(layer.bias), layer.out_features

    def _norm(self, norm: nn.LayerNorm | None) -> tuple[int, int, float]:
        if norm is None or not is_plain(norm, nn.LayerNorm):
            raise NotPackable(f"a {type(norm).__name__} stands where a plain nn.LayerNorm was")
        return self._address(norm.weight), self._address(norm.bias), norm.eps

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        if tensor.device.type != "cpu":
            raise NotPackable(f"its weights are on {tensor.device}")
        self._keep.append(tensor.detach().float().contiguous())
        return self._keep[-1].data_ptr()

    def _set_embeddings(self, given: Embeddings) -> None:
        words, segments = given.words, given.segments
        self.encoder.set_embeddings(
            self._address(words),
            *words.shape,
            given.trigram,
            None if given.before is None else self._linear(given.before),
            self._address(given.positions),
            len(given.positions),
            self._address(segments),
            0 if segments is None else len(segments),
            self._norm(given.norm),
            None if given.after is None else self._linear(given.after),
        )

    def run(
        self,
        hidden: Tensor,
        starts: Tensor,
        ids: Tensor | None = None,
        places: Tensor | None = None,
        kinds: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """Overwrites `hidden`, on torch's number of threads; any number of callers at a time.

        Args:
            hidden: float32 [tokens, H], contiguous: the result, and without `ids` the embeddings.
            starts: int64 [texts + 1], where each text begins, and the number of tokens.
            ids, places, kinds: int64 [tokens], contiguous: words, positions (None: 0, 1, .. in
                each text) and segments (None: all 0).
            bias: float32 [heads, longest, longest], added to the scores.

        Raises:
            UserError: a token, a position or a segment that the model does not have.
        """

        def address(tensor: Tensor | None) -> int:
            return 0 if tensor is None else tensor.data_ptr()

        texts, longest = len(starts) - 1, 0 if bias is None else bias.shape[-1]
        inputs = address(ids), address(places), address(kinds), address(hidden), address(starts)
        threads = torch.get_num_threads()
        try:
            self.encoder.run(*inputs, texts, threads, address(bias), longest)
        except IndexError as error:
            raise UserError(f"input: {error}; does the tokenizer belong to the model?") from None


def _segment(segment: Segment | None):
    if segment is None or segment.expr.is_leaf:
        return _NONE
    native = segment.value.native
    if native is None:
        raise NotPackable("one of its genes is too long for csrc")
    return segment.value.program.packed(), [_SOURCES[name] for name in segment.inputs]


def _units(layers: Encoder, layer: int) -> Sequence[_Block]:
    """The units of a layer's feed-forward part."""
    if layers.architecture.pieces.fused:
        ffn = layers.layers[layer].ffn
        if not isinstance(ffn, FFN):
            raise NotPackable(f"its {type(ffn).__name__} has no fixed gene; extract one first")
        text = ffn.plan.text
        return [_Block(unit.up, unit.gate, unit.down, unit.norm, text) for unit in ffn.units]
    block = layers.feed_forward(layer)
    if block.pre_norm:
        raise NotPackable("its norms stand before the products")
    if not block.gene:
        raise NotPackable("its activation is none of fastffn's primitives")
    if block.packed is not None:
        raise NotPackable("its gate and its first product are one")
    return [_Block(block.up, block.gate, block.down, block.norm, str(Gene.parse(block.gene).expr))]


def _repeated(base: nn.Module, layers: int) -> list[int]:
    """The layers that run after all ran once: ALBERT's groups run several times."""
    config = base.config
    groups = getattr(config, "num_hidden_groups", None)
    if groups is None:
        return []
    if groups != 1:
        raise NotPackable("its groups of shared layers take turns")
    return list(range(layers)) * (config.num_hidden_layers - 1)


_BY_COLUMNS = ("bert", "distilbert", "electra", "albert")
_BY_WORDS = ("roberta", "xlm-roberta", "camembert", "mpnet")


def embeddings_of(base: nn.Module) -> Embeddings | None:
    """The embeddings of a model whose sum is known here, else None."""
    kind, found = base.config.model_type, base.embeddings
    if kind == "efficientbert":
        if not all(is_plain(x, nn.Embedding) for x in _tables(found)):
            return None
        words, positions, segments = (x.weight for x in _tables(found))
        return Embeddings(words, positions, segments, found.norm, found.projection, found.trigram)
    if kind not in _BY_COLUMNS + _BY_WORDS or not _is_absolute(base):
        return None
    tables = [x for x in _tables(found) if x is not None]
    if not all(is_plain(x, nn.Embedding) for x in tables):
        return None
    words, positions, *segments = (x.weight for x in tables)
    after = getattr(base, "embeddings_project", None)
    if kind == "albert":
        after = base.encoder.embedding_hidden_mapping_in
    by_words = found.padding_idx if kind in _BY_WORDS else None
    return Embeddings(
        words,
        positions,
        segments[0] if segments else None,
        found.LayerNorm,
        after=after,
        by_words=by_words,
    )


def _is_absolute(base: nn.Module) -> bool:
    return getattr(base.config, "position_embedding_type", "absolute") in ("absolute", None)


def _tables(embeddings: nn.Module) -> list[nn.Module | None]:
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    return [getattr(embeddings, name, None) for name in names]
