"""A model's layers as csrc's `Encoder`: weights packed once for many products, one call a batch.

What goes in: layers of any width with their norms before or behind, with or without biases, gated
or not, with any gene; positions as embeddings, as a bias (MPNet) or as rotations, with windows
(ModernBERT); weights that layers share (ALBERT) are packed once. What does not, and is refused with
the reason, runs by torch (`optimize`): disentangled positions, pixels, activations without a
primitive of ours, modules that are not torch's plain ones.
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
from ..models import seams
from ..models.architectures import ALL, Encoder
from ..models.pieces import find
from ..ops import backend
from ..ops.ffn_plan import Segment, plan

_SOURCES = {Z1: 0, ZG: 1, X: 2, Z2: 3}  # csrc/encoder.h
_NONE = (None, [])
_KNOWN = ("transformers.", "fastffn.", "torch.nn.")  # whose forwards and hooks are known


class NotPackable(UserError):
    """The model has something that csrc's encoder does not compute."""


@dataclass(frozen=True)
class _Block:
    """One unit of a feed-forward part."""

    first: Sequence[nn.Linear]  # up, and gate if there is one; or one module with both
    down: nn.Linear
    norm: nn.LayerNorm
    text: str


@dataclass(frozen=True)
class Embeddings:
    """The tables that a token's vector is the sum of, and what is done with the sum.

    Attributes:
        words, positions, segments: [rows, width]; None: there are none.
        before: the projection of words; with `trigram` of a word and its neighbours.
        norm: of the sum.
        after: the projection of the normalised sum.
        by_words: position numbers count tokens that are no padding, from this number on
            (RoBERTa); None: they count columns from 0.
    """

    words: Tensor
    positions: Tensor | None
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
        windowed: some layers see a window around each token.
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
        if not hasattr(base.config, "vocab_size"):
            raise NotPackable("it reads no tokens")
        block = layers.attention_block(0)
        self._keep: list[Tensor] = []
        self.relative = base.config.model_type == "mpnet"
        self.hidden = block.output.out_features
        if block.heads * block.head_size != self.hidden:
            raise NotPackable("the heads together are of another width than the hidden states")
        if block.head_size > module.MAX_HEAD_SIZE:
            raise NotPackable(f"its heads are wider than {module.MAX_HEAD_SIZE}")
        shape = self.hidden, block.heads, block.head_size
        self.encoder = module.Encoder(*shape, precision, block.pre_norm)
        self._rotations = _Rotations(base) if layers.architecture.rotary else None
        self.windowed = self._rotations is not None
        for layer in range(len(layers.layers)):
            self._add_layer(layers, layer)
        _check_is_own(base)
        for layer in _repeated(base, len(layers.layers)):
            self.encoder.repeat_layer(layer)
        if block.pre_norm:
            self.encoder.set_last_norm(self._norm(_last_norm(base), self.hidden))
        self._keep.clear()  # weights are packed
        self.embeddings = embeddings_of(base)
        if self.embeddings is not None:
            self._set_embeddings(self.embeddings)

    def __deepcopy__(self, memo: dict) -> "Packed":
        return self  # nothing of it changes

    def __reduce__(self):
        raise UserError(
            "an optimised model cannot be pickled, its weights are packed; "
            "send the model it was made from and optimise that"
        )

    def _add_layer(self, layers: Encoder, layer: int) -> None:
        block = layers.attention_block(layer)
        if block.bias is not None and not (self.relative or self._rotations):
            raise NotPackable(block.bias)
        if block.heads != layers.attention_block(0).heads:
            raise NotPackable("its layers have different numbers of heads")
        cosines = sines = places = 0
        window = -1
        if self._rotations is not None:
            *tables, window = self._rotations(layer)
            cosines, sines = (x.data_ptr() for x in tables)
            places = len(tables[0])
        one = (block.query, block.key, block.value) if block.packed is None else (block.packed,)
        self.encoder.add_layer(
            self._linears(one, 3, self.hidden, self.hidden),
            *self._linears((block.output,), 1, self.hidden, self.hidden),
            block.scale,
            None if block.norm is None else self._norm(block.norm, self.hidden),
            [self._unit(unit) for unit in _units(layers, layer)],
            cosines,
            sines,
            places,
            window,
        )

    def _unit(self, block: _Block):
        parts = plan(block.text)
        width = block.down.in_features
        first = self._linears(block.first, 2 if parts.gated else 1, width, self.hidden)
        segments = (_segment(x) for x in (parts.prologue, parts.middle, parts.epilogue))
        second = self._linears((block.down,), 1, self.hidden, width)
        return first, *second, width, *segments, self._norm(block.norm, self.hidden)

    def _linears(
        self, modules: Sequence[nn.Linear], count: int, outputs: int, inputs: int
    ) -> list[tuple[int, int, int]]:
        """So many products of modules that hold one each, or of one module that holds all."""
        found = []
        for module in modules:
            if not is_plain(module, nn.Linear):
                raise NotPackable(f"a {type(module).__name__} stands where a plain nn.Linear was")
            weights = module.weight.chunk(count // len(modules))
            bias, parts = module.bias, len(weights)
            biases = [None] * parts if bias is None else bias.chunk(parts)
            for weight, bias in zip(weights, biases, strict=True):
                if tuple(weight.shape) != (outputs, inputs):
                    raise NotPackable(
                        f"a weight is {list(weight.shape)} where [{outputs}, {inputs}] is expected"
                    )
                found.append((self._address(weight), self._address(bias), len(weight)))
        return found

    def _norm(self, norm: nn.LayerNorm | None, width: int) -> tuple[int, int, float]:
        if norm is None or not is_plain(norm, nn.LayerNorm):
            raise NotPackable(f"a {type(norm).__name__} stands where a plain nn.LayerNorm was")
        if norm.normalized_shape != (width,):
            raise NotPackable(f"a norm is of {norm.normalized_shape} where {width} is expected")
        return self._address(norm.weight), self._address(norm.bias), norm.eps

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        if tensor.device.type != "cpu":
            raise NotPackable(f"its weights are on {tensor.device}")
        self._keep.append(tensor.detach().float().contiguous())
        return self._keep[-1].data_ptr()

    def _set_embeddings(self, given: Embeddings) -> None:
        words, positions, segments = given.words, given.positions, given.segments
        taken = words.shape[1] * (3 if given.trigram else 1)
        width = words.shape[1] if given.before is None else given.before.out_features
        before, after = (
            None if module is None else self._linears((module,), 1, *shape)[0]
            for module, shape in (
                (given.before, (width, taken)),
                (given.after, (self.hidden, width)),
            )
        )
        if (width if given.after is None else self.hidden) != self.hidden:
            raise NotPackable("its embeddings are of another width than the hidden states")
        if any(x is not None and x.shape[1] != width for x in (positions, segments)):
            raise NotPackable("its embeddings are of different widths")
        self.encoder.set_embeddings(
            self._address(words),
            *words.shape,
            given.trigram,
            before,
            self._address(positions),
            0 if positions is None else len(positions),
            self._address(segments),
            0 if segments is None else len(segments),
            self._norm(given.norm, width),
            after,
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
        except ValueError as error:  # the instruction set was changed since
            raise UserError(f"{error}; optimise the model again") from None
        except IndexError as error:
            raise UserError(f"input: {error}; does the tokenizer belong to the model?") from None


def _check_is_own(base: nn.Module) -> None:
    """Raises NotPackable where csrc would not do what a module's own code or hook does. The pooler
    stays as it is."""
    pooler = getattr(base, "pooler", None)
    kept = set() if pooler is None else set(pooler.modules())
    for name, module in base.named_modules():
        if module in kept:
            continue
        kind = module.original if isinstance(module, seams.Patched) else type(module)
        if not kind.forward.__module__.startswith(_KNOWN) or "forward" in module.__dict__:
            raise NotPackable(f"{name or 'it'} has a forward of its own ({kind.__name__})")
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers' own record hidden states, which are refused when they are asked for
        if any(not getattr(hook, "__module__", "").startswith(_KNOWN) for hook in hooks):
            raise NotPackable(f"{name or 'it'} has hooks, which would not be called")


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
        return [
            _Block([x for x in (unit.up, unit.gate) if x is not None], unit.down, unit.norm, text)
            for unit in ffn.units
        ]
    block = layers.feed_forward(layer)
    if not block.gene:
        raise NotPackable("its activation is none of fastffn's primitives")
    first = [x for x in (block.up, block.gate, block.packed) if x is not None]
    return [_Block(first, block.down, block.norm, str(Gene.parse(block.gene).expr))]


class _Rotations:
    """ModernBERT's: the cosines and sines of each kind of layer, and how far it sees.

    They are kept here for as long as csrc reads them.
    """

    def __init__(self, base: nn.Module):
        self._config, self._kinds = base.config, [x.attention_type for x in base.layers]
        types = set(base.rotary_emb.rope_type.values())
        if types - {"default"}:
            raise NotPackable(f"its rotations are {', '.join(sorted(types))}")
        places = torch.arange(base.config.max_position_embeddings)[None]
        self._tables = {}
        for kind in set(self._kinds):
            both = base.rotary_emb(torch.empty(1), places, kind)
            self._tables[kind] = [x[0, :, : x.shape[-1] // 2].contiguous() for x in both]

    def __call__(self, layer: int) -> tuple[Tensor, Tensor, int]:
        """cosines and sines [positions, head size / 2], and the window, -1 for none."""
        kind = self._kinds[layer]
        window = self._config.sliding_window if kind == "sliding_attention" else -1
        return *self._tables[kind], window


# Where the norm behind the last layer is, where norms stand before.
_LAST_NORMS = {
    "megatron-bert": "encoder.ln",
    "modernbert": "final_norm",
    "roberta-prelayernorm": "LayerNorm",
    "xlm-roberta-xl": "encoder.LayerNorm",
}


def _last_norm(base: nn.Module) -> nn.Module:
    if base.config.model_type not in _LAST_NORMS:
        raise NotPackable(f"where a {base.config.model_type} ends is not known")
    return find(base, _LAST_NORMS[base.config.model_type])


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
    if kind == "modernbert":
        words = found.tok_embeddings
        known = is_plain(words, nn.Embedding)
        return Embeddings(words.weight, None, None, found.norm) if known else None
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
    by_words = found.padding_idx if kind in _BY_WORDS else None
    return Embeddings(
        words,
        positions,
        segments[0] if segments else None,
        found.LayerNorm,
        after=projection_of(base),
        by_words=by_words,
    )


def projection_of(base: nn.Module) -> nn.Linear | None:
    """The projection behind the embeddings that is not part of them."""
    if base.config.model_type == "albert":
        return base.encoder.embedding_hidden_mapping_in
    return getattr(base, "embeddings_project", None)


def _is_absolute(base: nn.Module) -> bool:
    return getattr(base.config, "position_embedding_type", "absolute") in ("absolute", None)


def _tables(embeddings: nn.Module) -> list[nn.Module | None]:
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    return [getattr(embeddings, name, None) for name in names]
