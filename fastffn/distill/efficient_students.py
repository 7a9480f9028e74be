"""EfficientBERT students and supernets of a recipe: from a teacher, from a supernet, or random.

    {from: teacher, genes: [...], layers: 6, embedding_size: 128, trigram: true}
    {from: supernet, genes: [...], layers: [0, 2, 5]}     the sub-network of these genes
    {preset: base}, {hidden_size: 360, genes: [...]}      random weights
    {from: teacher, max_stack: 2, max_width: 1024}        as a supernet

Genes are a list, or found ones by their file or name (see `gene_files`). What is not said is as in
`models.from_teacher` and `EfficientBertConfig`, with all layers of the source; genes that are not
given are the published ones, in a supernet one gelu unit of full width.
"""

import difflib
from collections.abc import Mapping

from torch import nn

from fastffn.distill.gene_files import gene_texts
from fastffn.distill.heads import Head, as_dtype, copy_head
from fastffn.distill.layers import source_layers
from fastffn.errors import UserError
from fastffn.models.architectures import Encoder

_SIZE = ("max_stack", "max_width", "gated")
# What a source fixes.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "type_vocab_size",
    "pad_token_id",
)


def efficient_student(
    options: Mapping[str, object],
    models: Mapping[str, nn.Module],
    head: Head,
    dtype: object = None,
    supernet: bool = False,
) -> nn.Module:
    """Builds an EfficientBERT model with a head.

    Args:
        options: see above; and any value of `EfficientBertConfig`.
        models: those that `from` may name.
        head: taken over from the source where kind, classes and shapes agree.
        dtype: None: float32.
        supernet: its FFNs are elastic, of the size that max_stack, max_width and gated say.

    Raises:
        UserError: an option that does not exist, does not fit the others or has a wrong value.
    """
    from huggingface_hub.errors import StrictDataclassError

    options = dict(options)
    source = models[options.pop("from")] if "from" in options else None
    what = "supernet" if supernet else "efficientbert"
    extracted = source is not None and getattr(Encoder(source).base.config, "supernet", None)
    _check_names(options, what, source is not None, bool(extracted))
    base = Encoder(source).base.config.ffn_base if extracted else options.get("ffn_base", 1)
    if "genes" in options:
        options["genes"] = gene_texts(options["genes"], base)
    try:
        if source is None:
            encoder = _random(options, supernet)
        elif extracted:
            encoder = _extracted(source, options)
        else:
            encoder = _from_teacher(source, options, supernet)
    except UserError:
        raise
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from error
    if head.kind == "none":
        return encoder.to(as_dtype(dtype))
    student = head.model(encoder.config, dtype, encoder)
    student.base_model.load_state_dict(encoder.state_dict())
    if source is not None:
        copy_head(source, student, head)
    return student


def _check_names(options: dict, what: str, has_source: bool, extracted: bool) -> None:
    """Refuses options that would say nothing, or say again what the source says."""
    from fastffn.models import EfficientBertConfig

    size = {*_SIZE} if what == "supernet" else set()
    if extracted and size:
        raise UserError("supernet: its source is one already: take it with layers_of")
    known = {*vars(EfficientBertConfig)["__annotations__"]} - {"supernet"} | size
    if extracted:
        known = {"genes", "layers"}
    elif has_source:
        known = known - {*_SHARED} | {"layers", "how"}
    else:
        known |= {"preset"}
    if size and (missing := [name for name in _SIZE[:2] if name not in options]):
        raise UserError(f"supernet: {' and '.join(missing)} missing: say how large it is")
    for name in options:
        if name in known:
            continue
        if has_source and name in _SHARED:
            raise UserError(f"{what}: {name} is that of the model it is made from: leave it out")
        near = difflib.get_close_matches(name, sorted(known), n=1)
        remedy = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
        raise UserError(f"{what}: {name} is unknown: {remedy}")


def _random(options: dict, supernet: bool) -> nn.Module:
    from fastffn.models import EfficientBertConfig, EfficientBertModel

    if supernet:
        options["supernet"] = {name: options.pop(name) for name in _SIZE if name in options}
    preset = options.pop("preset", None)
    if preset is None:
        config = EfficientBertConfig(**options)
    else:
        config = EfficientBertConfig.preset(preset, **options)
    return EfficientBertModel(config)


def _from_teacher(source: nn.Module, options: dict, supernet: bool) -> nn.Module:
    from fastffn.models import from_teacher, supernet_from_teacher
    from fastffn.models.configuration_efficientbert import published_genes

    count = len(Encoder(source).layers)
    layers = source_layers(options.pop("layers", None), count, options.pop("how", None))
    if supernet:
        return supernet_from_teacher(source, layers=layers, **options)
    genes = options.pop("genes", None)
    if genes is None:
        genes = published_genes(len(layers))
    return from_teacher(source, genes, layers, **options)


def _extracted(source: nn.Module, options: dict) -> nn.Module:
    from fastffn.models import extract

    base, genes = Encoder(source).base, options.get("genes")
    layers, count = None, len(base.encoder.layer)
    if "layers" in options:
        layers = source_layers(options["layers"], count)
    if isinstance(genes, str):
        genes = [genes] * (count if layers is None else len(layers))
    return extract(base, genes, layers)
