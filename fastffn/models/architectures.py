"""The encoders whose insides are known: where their layers are, and the pieces of a layer.

One row per structure, looked up by `config.model_type`, so that subclasses and heads are covered.
A model that transformers does not know by type (a class of one's own) is told by its attributes
instead, if it has BERT's modules under BERT's names, or those of fastffn's models. One of
transformers' own that has no row is refused, whatever its attributes: Longformer has BERT's names
and holds its activations transposed, LayoutLMv3 adds position terms to the scores.

Each row was checked against the sources of transformers 5 and is tested against hand-made
projections (tests/test_capture.py) and against what `fastffn.patch` makes of it
(tests/test_patch.py). To add one, add it here and to the tests.

Two tables: `ARCHITECTURES`, whose layers can be taught one by one; and `ALL`, with those besides
that only run faster: ALBERT, whose layers share one set of weights, and ViT, which reads pixels.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import UserError
from . import pieces
from .pieces import AttentionBlock, FeedForward, Pieces, find


@dataclass(frozen=True)
class Architecture:
    """Where things are in one kind of encoder.

    Attributes:
        layers: path from the encoder to its `ModuleList` of layers.
        shared: path from an entry of that list to a `ModuleList` of layers, where the entries are
            groups of layers that run several times.
        attention: path from a layer to the module whose children are the projections.
        projections: the three that make q, k and v, or one that makes them side by side.
        rotary: the attention rotates q and k after their projection, and is handed
            `position_embeddings`, (cos, sin) of [batch or 1, length, head width].
        no_scores: why its attention scores are not q k^T / sqrt(head width) alone; "": they are.
        after_first: path from the encoder to a module, where there is one, that works on the first
            layer's output before the second layer sees it.
        pieces: where the rest of a layer is.
    """

    layers: str = "encoder.layer"
    shared: str = ""
    attention: str = "attention.self"
    projections: tuple[str, ...] = ("query", "key", "value")
    rotary: bool = False
    no_scores: str = ""
    after_first: str = ""
    pieces: Pieces = pieces.BERT


_BERT = Architecture()
_EFFICIENT_BERT = Architecture(attention="attention", pieces=pieces.EFFICIENT_BERT)

ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "camembert": _BERT,
    "data2vec-text": _BERT,
    "electra": _BERT,
    "ernie": _BERT,
    "megatron-bert": Architecture(pieces=pieces.MEGATRON_BERT),
    "roberta": _BERT,
    "roberta-prelayernorm": Architecture(pieces=pieces.ROBERTA_PRELAYERNORM),
    "xlm-roberta": _BERT,
    "xlm-roberta-xl": Architecture(pieces=pieces.XLM_ROBERTA_XL),
    "efficientbert": _EFFICIENT_BERT,
    "distilbert": Architecture(
        layers="transformer.layer",
        attention="attention",
        projections=("q_lin", "k_lin", "v_lin"),
        pieces=pieces.DISTILBERT,
    ),
    "mpnet": Architecture(
        attention="attention.attn",
        projections=("q", "k", "v"),
        no_scores="it adds a bias for relative positions to q k^T",
        pieces=pieces.MPNET,
    ),
    "deberta-v2": Architecture(
        projections=("query_proj", "key_proj", "value_proj"),
        no_scores="they are not q k^T alone but the sum of disentangled position terms too",
        after_first="encoder.conv",
    ),
    "modernbert": Architecture(
        layers="layers",
        attention="attn",
        projections=("Wqkv",),
        rotary=True,
        pieces=pieces.MODERNBERT,
    ),
}

ALL: dict[str, Architecture] = ARCHITECTURES | {
    "albert": Architecture(
        layers="encoder.albert_layer_groups",
        shared="albert_layers",
        attention="attention",
        pieces=pieces.ALBERT,
    ),
    "vit": Architecture(
        layers="layers",
        attention="attention",
        projections=("q_proj", "k_proj", "v_proj"),
        pieces=pieces.VIT,
    ),
}

_UNNAMED = "its class is not known, and BERT's structure does not say how it makes them"
_BY_ATTRIBUTES = tuple(
    dataclasses.replace(known, no_scores=_UNNAMED) for known in (_BERT, _EFFICIENT_BERT)
)


class Encoder:
    """The base of a model, with its architecture.

    Args:
        model: an encoder or a model with heads on top of one, as it is or wrapped by
            DataParallel, DistributedDataParallel or torch.compile.
        known: the table to look it up in.

    Attributes:
        base: the encoder itself, without heads and wrappers.
        architecture: its row.
        layers: all its layers, each once, those too that a capture has switched off for now.

    Raises:
        UserError: a structure that is not known.
    """

    def __init__(self, model: nn.Module, known: Mapping[str, Architecture] = ARCHITECTURES):
        model = unwrapped(model)
        self.base: nn.Module = getattr(model, "base_model", model)
        self.architecture = _architecture(self.base, known)
        layers = find(self.base, self.architecture.layers)
        if self.architecture.shared:
            groups = [find(group, self.architecture.shared) for group in layers]
            layers = nn.ModuleList(layer for group in groups for layer in group)
        self.layers: nn.ModuleList = layers.whole if isinstance(layers, Walk) else layers

    def attention(self, layer: int) -> nn.Module:
        """The module whose children are the projections."""
        return find(self.layers[layer], self.architecture.attention)

    def projections(self, layer: int) -> tuple[nn.Module, ...]:
        """The modules that make q, k and v, or the one that makes all three.

        Raises:
            UserError: the layer has another structure than its architecture says.
        """
        return _projections(self.layers[layer], self.architecture)

    def feed_forward(self, layer: int) -> FeedForward:
        """The feed-forward part of a layer.

        Raises:
            UserError: the layer has another structure than its architecture says, or blocks of
                fastffn, which have no such parts.
        """
        self._check_is_named()
        return pieces.feed_forward(self.layers[layer], self.architecture.pieces)

    def attention_block(self, layer: int) -> AttentionBlock:
        """The attention of a layer, with the product and the norm around it.

        Raises:
            UserError: the layer has another structure than its architecture says.
        """
        self._check_is_named()
        row, heads = self.architecture.pieces, self.base.config.num_attention_heads
        found = self.layers[layer], row, self.projections(layer), heads
        return pieces.attention_block(*found, self._bias(layer))

    def _bias(self, layer: int) -> str | None:
        turned = "it rotates queries and keys by their positions"
        reasons = [turned] if self.architecture.rotary else []
        reasons += [why] if (why := self.why_no_scores(layer)) else []
        return "; ".join(reasons) or None

    def _check_is_named(self) -> None:
        """A class of one's own may do anything with modules of BERT's names."""
        origin = type(self.layers[0]).__module__.partition(".")[0]
        if self.architecture in _BY_ATTRIBUTES or origin not in ("transformers", "fastffn"):
            raise UserError(
                f"{type(self.base).__name__} has BERT's modules under BERT's names, but what "
                "it does with them is not known: give one of transformers' own classes"
            )

    def output(self, layer: int) -> nn.Module:
        """The module whose output the next layer sees."""
        after = self.architecture.after_first
        after = find(self.base, after) if after and layer == 0 else None
        return self.layers[layer] if after is None else after

    def why_no_scores(self, layer: int) -> str:
        """Why q and k of a layer do not give the scores of its attention; "": they do."""
        config = getattr(self.base, "config", None)
        if self.architecture.no_scores:
            return self.architecture.no_scores
        if getattr(config, "is_decoder", False):
            return "it is a decoder and hides later tokens from earlier ones"
        kinds = getattr(config, "layer_types", None) or ()
        if layer < len(kinds) and kinds[layer] != "full_attention":
            whole = [k for k, kind in enumerate(kinds) if kind == "full_attention"]
            return (
                f"layer {layer} sees a window of its neighbours only, layers "
                f"{', '.join(map(str, whole))} see all tokens"
            )
        return ""

    @contextlib.contextmanager
    def walking(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Within the block a forward runs these layers, in their order; they may be others."""
        place, _, name = self.architecture.layers.rpartition(".")
        holder = find(self.base, place)
        before = getattr(holder, name)
        setattr(holder, name, Walk(self.layers, layers))
        try:
            yield
        finally:
            setattr(holder, name, before)

    def running(self) -> int:
        """How many layers a forward runs now."""
        return len(find(self.base, self.architecture.layers))


class Walk(nn.ModuleList):
    """Some layers to whoever walks or indexes them, the encoder's own, all of them, to torch.

    Parameters, `state_dict`, `modules()` and devices see the whole under its usual names, and
    nothing of layers that belong elsewhere. Why not another `ModuleList`: transformers installs its
    recorders of hidden states on the layers that it finds at the first call that asks for them,
    once and for all, so layers that were missing then would never be recorded.
    """

    def __init__(self, whole: nn.ModuleList, walked: Sequence[nn.Module]):
        super().__init__()
        self._modules = whole._modules
        self.__dict__.update(whole=whole, walked=tuple(walked))

    def __iter__(self):
        return iter(self.walked)

    def __len__(self) -> int:
        return len(self.walked)

    def __getitem__(self, index):
        return self.walked[index]


def encoders(model: nn.Module, known: Mapping[str, Architecture] = ALL) -> list[Encoder]:
    """All encoders in a model, whatever is around them, by their configuration alone.

    Raises:
        UserError: there is none of a known type.
    """

    def is_one(module: nn.Module) -> bool:
        row = known.get(_kind(module))
        return row is not None and _has_layers(module, row)

    found = [Encoder(module, known) for module in model.modules() if is_one(module)]
    if not found:
        raise UserError(
            f"{_named(unwrapped(model))} has no encoder that is known here: known are "
            f"{', '.join(sorted(known))} of transformers, with any head"
        )
    return found


def parameter_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each parameter the names it goes by: its own, and one that all encoders share:
    "layers.<k>.", "embeddings." or "head." and the rest of its path."""
    encoder = Encoder(model)
    places = {id(p): f"head.{name}" for name, p in model.named_parameters()}
    places |= {id(p): name for name, p in encoder.base.named_parameters()}
    places |= {id(p): f"layers.{name}" for name, p in encoder.layers.named_parameters()}
    return {name: (name, places[id(p)]) for name, p in model.named_parameters()}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile's wrapper."""
    while True:
        inner = [model._modules.get(name) for name in ("module", "_orig_mod")]
        inner = [module for module in inner if module is not None]
        if not inner:
            return model
        model = inner[0]


def _projections(layer: nn.Module, architecture: Architecture) -> tuple[nn.Module, ...]:
    attention = find(layer, architecture.attention)
    found = tuple(getattr(attention, name, None) for name in architecture.projections)
    if not all(isinstance(module, nn.Module) for module in found):
        *first, last = architecture.projections
        names = f"{', '.join(first)} and {last}" if first else last
        raise UserError(
            f"{type(layer).__name__} has no {names} at {architecture.attention}: it is not built "
            "as its architecture says"
        )
    return found


def _architecture(base: nn.Module, known: Mapping[str, Architecture]) -> Architecture:
    kind = _kind(base)
    rows = [known[kind]] if kind in known else []
    config = getattr(base, "config", None)
    foreign = not rows and type(config).__module__.startswith("transformers.")
    if not foreign:
        rows += _BY_ATTRIBUTES
    built = [row for row in rows if _has_layers(base, row)]
    for row in built:
        found = find(_first_layer(base, row), row.attention)
        if all(isinstance(getattr(found, name, None), nn.Module) for name in row.projections):
            return row
    if built:
        _projections(_first_layer(base, built[0]), built[0])
    raise UserError(
        f"{_named(base)} is no BERT-like encoder that is known here: known are "
        f"{', '.join(sorted(known))} with any head, and classes of your own that have "
        "BERT's modules under BERT's names; give one of those"
    )


def _kind(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _named(model: nn.Module) -> str:
    kind = _kind(model)
    return f"{type(model).__name__} (model_type {kind})" if kind else type(model).__name__


def _has_layers(base: nn.Module, architecture: Architecture) -> bool:
    layers = find(base, architecture.layers)
    return isinstance(layers, nn.ModuleList) and len(layers) > 0


def _first_layer(base: nn.Module, architecture: Architecture) -> nn.Module:
    first = find(base, architecture.layers)[0]
    return find(first, architecture.shared)[0] if architecture.shared else first
