"""The pieces of a layer around its attention scores and between its two big products.

    post-norm    a = norm1(x + dropout(output(mixed)))     y = norm2(a + dropout(down(f(up(a)))))
    pre-norm     a = x + dropout(output(mixed(norm1(x))))  y = a + dropout(down(f(up(norm2(a)))))

`Pieces` says by dotted paths, relative to a layer, where one architecture has them; a path is ""
where it has no such piece. The rows stand in `architectures`. Who computes what with them follows
from the paths and from no further column: a norm that lies in the module of `down` is applied by
that module, one that lies in the layer by the layer itself (`patch`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError


@dataclass(frozen=True)
class Pieces:
    """Paths from a layer to its pieces.

    Attributes:
        output, output_norm, output_dropout: attention's last product, and the norm and the dropout
            that belong to it; of a pre-norm layer, the norm before its projections.
        up, gate, down: the products; `packed` instead of up and gate where one product makes both,
            up's columns first.
        activation: on the result of up.
        norm, dropout: as those of attention's output, of the feed-forward part.
        inner_dropout: between the activation and `down`.
        pre_norm: the norms stand before and not behind.
        fused: the feed-forward part is a block of fastffn: the other paths do not count.
    """

    output: str = "attention.output.dense"
    output_norm: str = "attention.output.LayerNorm"
    output_dropout: str = "attention.output.dropout"
    up: str = "intermediate.dense"
    gate: str = ""
    packed: str = ""
    down: str = "output.dense"
    activation: str = "intermediate.intermediate_act_fn"
    norm: str = "output.LayerNorm"
    dropout: str = "output.dropout"
    inner_dropout: str = ""
    pre_norm: bool = False
    fused: bool = False


BERT = Pieces()
ALBERT = Pieces(
    output="attention.dense",
    output_norm="attention.LayerNorm",
    output_dropout="attention.output_dropout",
    up="ffn",
    down="ffn_output",
    activation="activation",
    norm="full_layer_layer_norm",
    dropout="",
)
DISTILBERT = Pieces(
    output="attention.out_lin",
    output_norm="sa_layer_norm",
    output_dropout="",
    up="ffn.lin1",
    down="ffn.lin2",
    activation="ffn.activation",
    norm="output_layer_norm",
    dropout="ffn.dropout",
)
EFFICIENT_BERT = Pieces(
    output="attention.output",
    output_norm="attention.norm",
    output_dropout="attention.dropout",
    fused=True,
)
MEGATRON_BERT = Pieces(output_norm="attention.ln", norm="ln", pre_norm=True)
MODERNBERT = Pieces(
    output="attn.Wo",
    output_norm="attn_norm",
    output_dropout="attn.out_drop",
    up="",
    packed="mlp.Wi",
    down="mlp.Wo",
    activation="mlp.act",
    norm="mlp_norm",
    dropout="",
    inner_dropout="mlp.drop",
    pre_norm=True,
)
MPNET = Pieces(
    output="attention.attn.o",
    output_norm="attention.LayerNorm",
    output_dropout="attention.dropout",
)
ROBERTA_PRELAYERNORM = Pieces(
    output_norm="attention.LayerNorm", norm="intermediate.LayerNorm", pre_norm=True
)
VIT = Pieces(
    output="attention.o_proj",
    output_norm="layernorm_before",
    output_dropout="dropout",
    up="mlp.fc1",
    down="mlp.fc2",
    activation="mlp.activation_fn",
    norm="layernorm_after",
    dropout="dropout",
    pre_norm=True,
)
XLM_ROBERTA_XL = Pieces(
    output_norm="attention.self_attn_layer_norm", norm="LayerNorm", dropout="", pre_norm=True
)


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward part of a layer. Weights are [outputs, inputs], as in nn.Linear.

    Attributes:
        up, gate, down: the products; gate None where it is not gated. With `packed` up and gate are
            None: its rows are those of up, then those of gate.
        activation: our primitive, such as "gelu_erf"; "" where it is none of ours.
        norm: behind the sum with the residual, or with `pre_norm` before the products.
        dropout: probability on the result of down, in training.
        inner_dropout: probability on what down takes, in training.
        gene: the function, such as "down(gelu_erf(up(x)))"; "" without a primitive.
    """

    up: nn.Linear | None
    gate: nn.Linear | None
    down: nn.Linear
    packed: nn.Linear | None
    norm: nn.LayerNorm
    activation: str
    pre_norm: bool
    dropout: float
    inner_dropout: float
    gene: str


@dataclass(frozen=True)
class AttentionBlock:
    """The attention of a layer with what surrounds it.

    Attributes:
        query, key, value: the projections. With `packed` they are None: its rows are those of
            query, key and value.
        output: the product behind attention.
        norm: behind the sum with the residual, or with `pre_norm` before the projections; None
            where there is none.
        heads, head_size: of q, k and v.
        scale: of q k^T, as far as `bias` is None.
        dropout: probability on the result of output, in training.
        bias: in words, what the scores have besides scale q k^T and the mask of padding; None:
            nothing.
    """

    query: nn.Linear | None
    key: nn.Linear | None
    value: nn.Linear | None
    packed: nn.Linear | None
    output: nn.Linear
    norm: nn.LayerNorm | None
    heads: int
    head_size: int
    scale: float
    pre_norm: bool
    dropout: float
    bias: str | None


def find(module: nn.Module | None, path: str) -> nn.Module | None:
    """The submodule at a dotted path ("": the module itself); None if there is none."""
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
    return module


def feed_forward(layer: nn.Module, pieces: Pieces) -> FeedForward:
    """The feed-forward part; raises UserError where the layer is built otherwise."""
    if pieces.fused:
        raise UserError(
            f"{type(layer).__name__} has blocks of fastffn, which are fused: read its `ffn`"
        )
    activation = activation_name(_piece(layer, pieces.activation))
    gated = pieces.packed or pieces.gate
    inner = f"{activation}(up(x))"
    inner = f"mul({inner}, gate(x))" if gated else inner
    return FeedForward(
        up=_piece(layer, pieces.up),
        gate=_piece(layer, pieces.gate),
        down=_piece(layer, pieces.down),
        packed=_piece(layer, pieces.packed),
        norm=_piece(layer, pieces.norm),
        activation=activation,
        pre_norm=pieces.pre_norm,
        dropout=_probability(layer, pieces.dropout),
        inner_dropout=_probability(layer, pieces.inner_dropout),
        gene=f"down({inner})" if activation else "",
    )


def attention_block(
    layer: nn.Module,
    pieces: Pieces,
    projections: Sequence[nn.Linear],
    heads: int,
    bias: str | None,
) -> AttentionBlock:
    """The attention; raises UserError where the layer is built otherwise."""
    packed = projections[0] if len(projections) == 1 else None
    query, key, value = (None, None, None) if packed is not None else projections
    width = projections[0].out_features // (1 if packed is None else 3)
    norm = _piece(layer, pieces.output_norm)
    return AttentionBlock(
        query=query,
        key=key,
        value=value,
        packed=packed,
        output=_piece(layer, pieces.output),
        norm=None if isinstance(norm, nn.Identity) else norm,
        heads=heads,
        head_size=width // heads,
        scale=(width // heads) ** -0.5,
        pre_norm=pieces.pre_norm,
        dropout=_probability(layer, pieces.output_dropout),
        bias=bias,
    )


def _piece(layer: nn.Module, path: str):
    """What lies at a path, a module or an activation that is a function; None for ""."""
    found = find(layer, path) if path else None
    if path and found is None:
        raise UserError(
            f"{type(layer).__name__} has no {path}: it is not built as its architecture says"
        )
    return found


def _probability(layer: nn.Module, path: str) -> float:
    dropout = _piece(layer, path)
    return dropout.p if isinstance(dropout, nn.Dropout) else 0.0


# By the name of the class: transformers' activations are classes of its own and of torch. All the
# tanh forms of gelu are one function, up to the rounding of their constants.
_PRIMITIVES = {
    "GELUActivation": "gelu_erf",
    "NewGELUActivation": "gelu",
    "FastGELUActivation": "gelu",
    "AccurateGELUActivation": "gelu",
    "GELUTanh": "gelu",
    "ReLU": "relu",
    "SiLU": "swish",
    "SiLUActivation": "swish",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
}
_FUNCTIONS = {
    F.gelu: "gelu_erf",
    F.relu: "relu",
    F.silu: "swish",
    F.sigmoid: "sigmoid",
    F.tanh: "tanh",
    torch.relu: "relu",
    torch.sigmoid: "sigmoid",
    torch.tanh: "tanh",
}


def activation_name(activation) -> str:
    """Our primitive of an activation module or function; "" where it is none of ours."""
    kind = type(activation)
    if not isinstance(activation, nn.Module):
        return _FUNCTIONS.get(activation, "")
    if kind is nn.GELU:
        return "gelu" if activation.approximate == "tanh" else "gelu_erf"
    if kind is nn.LeakyReLU:
        return "leaky_relu" if activation.negative_slope == 0.01 else ""
    if kind is nn.ELU:
        return "elu" if activation.alpha == 1 else ""
    known = kind.__module__.startswith(("torch.nn.", "transformers.activations"))
    return _PRIMITIVES.get(kind.__name__, "") if known else ""
