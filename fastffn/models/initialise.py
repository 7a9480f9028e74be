"""Students that start from a BERT-structured teacher instead of from noise.

A student of the teacher's hidden size takes over, without training:

- the embeddings; with an `embedding_size` k, the word embedding's best rank-k approximation: with
  mean m of its rows, E - m = U S V^T, the table is U_k S_k = (E - m) V_k [vocabulary, k], the
  projection V_k [H, k] with bias m;
- the attention of the chosen layers;
- of their FFNs the strongest intermediate units, in descending order, so that a narrower gene of
  an elastic block keeps the strongest. The strength of unit i is |up_i| * |down_i|, where up_i
  contains the bias; given sample text, rms(activation_i) * |down_i|, which also sees how often the
  unit fires.

A second and later unit of a stack has no counterpart in the teacher and starts near identity: it
goes on with the teacher's next-strongest units, their `down` scaled by `LATER_SCALE`, and its
LayerNorm has the mean and the standard deviation that the one before produces. When the teacher
has no further units they repeat with `down` zero. (Of the scales 0, 0.1, 0.3, 0.5, 0.7 and 1, 0.3
kept most of all-MiniLM-L6-v2's sentence similarities before any training, over two depths and two
narrow stacks; repeating units at any scale above 0 lost some.)
A gate starts as the constant 1: `mul(gelu_erf(up(x)), gate(x))` is the teacher's function.

With all layers, full width and the teacher's activation the student's outputs are the teacher's.
"""

from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..expr import Gene
from ..layers.elastic import leading_slices
from ..layers.ffn import FFNUnit, as_gene
from .configuration_efficientbert import EfficientBertConfig
from .modeling_efficientbert import EfficientBertModel, EfficientBertPreTrainedModel

LATER_SCALE = 0.3  # of `down` in the second and later units of a stack

# The first tokens of these have position padding_idx + 1, not 0.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")
_ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
    "silu": "swish",
    "swish": "swish",
    "tanh": "tanh",
}


def bert_encoder(teacher: nn.Module) -> nn.Module:
    """The base model of a BERT-structured Hugging Face model, below whatever head it has.

    Raises:
        UserError: it is no such model (BERT, RoBERTa, XLM-R, CamemBERT and models with their
            module names are), or runs as a decoder.
    """
    base = getattr(teacher, getattr(teacher, "base_model_prefix", "") or "", teacher)
    try:
        layer = base.encoder.layer[0]
        layer.attention.self.query, layer.attention.output.LayerNorm  # noqa: B018
        layer.intermediate.dense, layer.output.LayerNorm  # noqa: B018
        base.embeddings.word_embeddings, base.embeddings.position_embeddings  # noqa: B018
        base.embeddings.token_type_embeddings, base.embeddings.LayerNorm  # noqa: B018
        width = base.embeddings.word_embeddings.embedding_dim
    except (AttributeError, TypeError, IndexError):
        raise UserError(
            f"teacher: {type(teacher).__name__} is no BERT-like encoder "
            "(BERT, RoBERTa, XLM-R and CamemBERT are)"
        ) from None
    if width != base.config.hidden_size:
        raise UserError("teacher: its word embedding is not as wide as its hidden states")
    if getattr(base.config, "position_embedding_type", "absolute") != "absolute":
        raise UserError("teacher: only absolute position embeddings can be taken over")
    if getattr(base.config, "is_decoder", False) or getattr(
        base.config, "add_cross_attention", False
    ):
        raise UserError(
            "teacher: a decoder, or one with cross-attention, computes what no student takes over; "
            "load it with is_decoder=False and add_cross_attention=False if it is an encoder"
        )
    return base


def plain_gene(teacher: nn.Module, stack: int, width: int, base: int = 1) -> Gene:
    """The gene of the teacher's own kind of FFN, `stack` units of `width` columns."""
    config = bert_encoder(teacher).config
    activation = _ACTIVATIONS.get(config.hidden_act)
    if activation is None:
        raise UserError(
            f"teacher: its activation {config.hidden_act!r} is none of {', '.join(_ACTIVATIONS)}"
        )
    ratio = Fraction(width, config.hidden_size * base)
    return Gene.parse(f"{stack}x{ratio} down({activation}(up(x)))", base=base)


@torch.no_grad()
def from_teacher(
    teacher: nn.Module,
    genes: Gene | str | Sequence[Gene | str],
    layers: Sequence[int] = (0, 2, 5),
    embedding_size: int | None = None,
    *,
    trigram: bool = False,
    ffn_base: int = 1,
    samples: Mapping[str, Tensor] | None = None,
    sentence_pooling: str | None = "mean",
    **config: object,
) -> EfficientBertModel:
    """A student of the teacher's hidden size, initialised from its layers.

    Args:
        teacher: a BERT-structured Hugging Face model, with or without a head.
        genes: one for each chosen layer, or one for all of them.
        layers: teacher layers to take over, in their order in the student; negative ones count
            from the last.
        embedding_size: None for the teacher's own word embedding, else its rank.
        trigram: the projection also reads the neighbours, with weights that start at zero.
        ffn_base: as in `EfficientBertConfig`; for genes given as text.
        samples: a batch for the teacher (input_ids [B, T], attention_mask, ...): strength of the
            FFN units is then measured on it.
        sentence_pooling: goes into the student's configuration, like
        config: any other value of `EfficientBertConfig`, e.g. hidden_dropout_prob.

    Returns:
        The student in evaluation mode, in the teacher's dtype and on its device.

    Raises:
        UserError: the teacher is not BERT-structured, a layer does not exist, the genes do not
            fit the layers, or embedding_size is not below the hidden size.
    """
    base = bert_encoder(teacher)
    layers = layer_indices(layers, len(base.encoder.layer))
    if isinstance(genes, Gene | str):
        genes = [genes] * len(layers)
    genes = [as_gene(gene, ffn_base) for gene in genes]
    if len(genes) != len(layers):
        raise UserError(f"genes: {len(genes)} given for {len(layers)} layers; give one for each")
    if embedding_size is not None and not 0 < embedding_size < base.config.hidden_size:
        raise UserError(
            f"embedding_size: expected from 1 to {base.config.hidden_size - 1}, or None for the "
            f"teacher's own embedding; got {embedding_size}"
        )
    values = _shared_config(base, layers) | {
        "genes": genes,
        "ffn_base": ffn_base,
        "embedding_size": embedding_size,
        "trigram": trigram,
        "sentence_pooling": sentence_pooling,
    }
    student = EfficientBertModel(EfficientBertConfig(**(values | config)))
    weight = base.embeddings.word_embeddings.weight
    student.to(device=weight.device, dtype=weight.dtype).eval()
    _copy_embeddings(base, student)
    strengths = unit_strengths(base, samples)
    for index, target in zip(layers, student.encoder.layer, strict=True):
        source = base.encoder.layer[index]
        _copy_attention(source.attention, target.attention)
        _copy_ffn(source, strengths[index], target.ffn.units)
    return student


def supernet_from_teacher(
    teacher: nn.Module,
    max_stack: int,
    max_width: int,
    layers: Sequence[int] = (0, 2, 5),
    embedding_size: int | None = None,
    *,
    gated: bool = False,
    genes: Gene | str | Sequence[Gene | str] | None = None,
    ffn_base: int = 1,
    **options: object,
) -> EfficientBertModel:
    """A supernet initialised like `from_teacher`'s student, with an `ElasticFFN` in each layer.

    Args:
        max_stack, max_width: units and intermediate columns of the largest gene.
        gated: whether gated genes can run.
        genes: those that run at first; None: one unit of the teacher's kind at max_width.
        layers, embedding_size, ffn_base, options: as in `from_teacher`.

    `model.set_genes(genes)` changes the genes, `extract(model, genes)` makes a student of them.
    """
    if genes is None:
        genes = plain_gene(teacher, 1, max_width, ffn_base)
    supernet = {"max_stack": max_stack, "max_width": max_width, "gated": gated}
    return from_teacher(
        teacher, genes, layers, embedding_size, ffn_base=ffn_base, supernet=supernet, **options
    )


@torch.no_grad()
def extract(
    supernet: EfficientBertPreTrainedModel,
    genes: Sequence[Gene | str] | None = None,
    layers: Sequence[int] | None = None,
    shared: Collection[str] = (),
) -> EfficientBertPreTrainedModel:
    """The stand-alone model of a sub-network, with copies of its weights.

    Works for the model with or without a head; outputs are the supernet's for these genes.

    Args:
        genes: one for each layer of the result; None: the current ones of these layers.
        layers: those of the supernet that it takes over, rising; None: all, or without genes those
            that run now.
        shared: names of parameters that are not copied but have the supernet's memory: for those
            that nobody trains.

    Raises:
        UserError: the model is no supernet, a gene does not fit it, or layers that it has not.
    """
    config = supernet.config
    if config.supernet is None:
        raise UserError("extract: the model is no supernet")
    if genes is None and layers is None:
        layers = config.kept_layers
    kept = config.checked_layers(layers) or list(range(config.num_hidden_layers))
    given = [config.genes[k] for k in kept] if genes is None else genes
    genes = [as_gene(gene, config.ffn_base) for gene in given]
    if len(genes) != len(kept):
        raise UserError(f"genes: {len(genes)} given for {len(kept)} layers")
    for k, gene in zip(kept, genes, strict=True):
        supernet.base_model.encoder.layer[k].ffn.check_gene(gene)
    changes = {"num_hidden_layers": len(kept), "genes": genes, "supernet": None}
    changes["kept_layers"] = None
    with torch.device("meta"):  # no memory and no random numbers: all weights come from there
        model = type(supernet)(type(config).from_dict(config.to_dict() | changes))
    weights = leading_slices(_of_layers(supernet.state_dict(), kept), model.state_dict())
    weights |= {name: weights[name].clone() for name in weights.keys() - set(shared)}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.train(supernet.training)


@torch.no_grad()
def unit_strengths(teacher: nn.Module, samples: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    """How much each intermediate unit of each layer contributes: L tensors [intermediate size]."""
    base = bert_encoder(teacher)
    down = [layer.output.dense.weight.norm(dim=0) for layer in base.encoder.layer]
    if samples is None:
        up = [
            torch.cat((layer.weight, layer.bias[:, None]), 1).norm(dim=1)
            for layer in (layer.intermediate.dense for layer in base.encoder.layer)
        ]
        return [a * b for a, b in zip(up, down, strict=True)]
    mask = samples.get("attention_mask")
    powers: list[Tensor] = []

    def record(_module, _inputs, output: Tensor) -> None:
        tokens = output.flatten(0, 1) if mask is None else output[mask.bool()]
        powers.append(tokens.square().mean(0).sqrt())

    hooks = [layer.intermediate.register_forward_hook(record) for layer in base.encoder.layer]
    modes = {module: module.training for module in base.modules()}
    try:
        base.eval()(**samples)
    finally:
        for module, training in modes.items():
            module.training = training
        for hook in hooks:
            hook.remove()
    return [a * b for a, b in zip(powers, down, strict=True)]


def layer_indices(layers: Sequence[int], count: int) -> list[int]:
    """Layer indices from 0; a UserError for one that the teacher does not have, or for none."""
    if not layers:
        raise UserError("layers: choose at least one layer of the teacher")
    for index in layers:
        if not -count <= index < count:
            raise UserError(f"layers: the teacher has layers 0 to {count - 1}, not {index}")
    return [index % count for index in layers]


def _of_layers(weights: Mapping[str, Tensor], kept: Sequence[int]) -> dict[str, Tensor]:
    """A model's weights with the kept layers alone, counted anew."""
    found = {}
    for name, weight in weights.items():
        before, stack, after = name.partition("encoder.layer.")
        index, _, rest = after.partition(".")
        if not stack:
            found[name] = weight
        elif int(index) in kept:
            found[f"{before}{stack}{kept.index(int(index))}.{rest}"] = weight
    return found


def _shared_config(base: nn.Module, layers: list[int]) -> dict[str, object]:
    """What the student's configuration has in common with the teacher's."""
    config = base.config
    pad = config.pad_token_id
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(layers),
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings - _position_offset(base),
        "type_vocab_size": config.type_vocab_size,
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "layer_norm_eps": config.layer_norm_eps,
        "initializer_range": config.initializer_range,
        "pad_token_id": pad if pad is not None and pad < config.vocab_size else None,
    }


def _position_offset(base: nn.Module) -> int:
    if base.config.model_type not in _OFFSET_POSITIONS:
        return 0
    return base.embeddings.position_embeddings.padding_idx + 1


def _copy(source: nn.Module, target: nn.Module) -> None:
    """Copies weight and bias between modules of the same shape."""
    target.weight.copy_(source.weight)
    if source.bias is not None:
        target.bias.copy_(source.bias)


def _copy_embeddings(base: nn.Module, student: EfficientBertModel) -> None:
    source, target = base.embeddings, student.embeddings
    words = source.word_embeddings.weight
    if target.projection is None:
        target.word_embeddings.weight.copy_(words)
    else:
        rank = target.word_embeddings.embedding_dim
        mean = words.double().mean(0)
        centred = words.double() - mean
        # The right singular vectors from the small [H, H] matrix: exact enough in double, and a
        # hundred times cheaper than the decomposition of the whole table.
        basis = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -rank:].flip(1)
        target.word_embeddings.weight.copy_(centred @ basis)
        target.projection.weight.zero_()
        first = rank if target.trigram else 0  # this token's part of [previous, this, next]
        target.projection.weight[:, first : first + rank].copy_(basis)
        target.projection.bias.copy_(mean)
    offset = _position_offset(base)
    target.position_embeddings.weight.copy_(source.position_embeddings.weight[offset:])
    target.token_type_embeddings.weight.copy_(source.token_type_embeddings.weight)
    _copy(source.LayerNorm, target.norm)


def _copy_attention(source: nn.Module, target: nn.Module) -> None:
    for name in ("query", "key", "value"):
        _copy(getattr(source.self, name), getattr(target, name))
    _copy(source.output.dense, target.output)
    _copy(source.output.LayerNorm, target.norm)


def _copy_ffn(source: nn.Module, strength: Tensor, units: Sequence[FFNUnit]) -> None:
    """Fills a stack of units from one teacher layer's FFN, strongest intermediate units first."""
    up, down = source.intermediate.dense, source.output.dense
    order = strength.argsort(descending=True)
    for index, unit in enumerate(units):
        width = unit.up.out_features
        chosen = order.roll(-index * width)[: min(width, len(order))]
        taken = len(chosen)
        fresh = max(0, min(taken, len(order) - index * width))  # new to the stack
        unit.up.weight[:taken].copy_(up.weight[chosen])
        unit.up.bias[:taken].copy_(up.bias[chosen])
        unit.down.weight.zero_()
        scale = 1.0 if index == 0 else LATER_SCALE
        unit.down.weight[:, :fresh].copy_(down.weight[:, chosen[:fresh]] * scale)
        if unit.gate is not None:
            unit.gate.weight.zero_()
            unit.gate.bias.fill_(1.0)
        if index == 0:
            unit.down.bias.copy_(down.bias)
            _copy(source.output.LayerNorm, unit.norm)
        else:
            unit.down.bias.zero_()
            _near_identity_norm(source.output.LayerNorm, unit.norm)


def _near_identity_norm(before: nn.Module, norm: nn.LayerNorm) -> None:
    """Makes `norm` undo its own normalisation of what `before` puts out.

    With unit-variance normalised values, a row of `before`'s output has mean mean(bias) and
    variance mean(weight^2) + var(bias) over the columns.
    """
    bias = before.bias
    norm.weight.fill_((before.weight.square().mean() + bias.var(unbiased=False)).sqrt())
    norm.bias.fill_(bias.mean())
