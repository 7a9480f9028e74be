"""Configuration of EfficientBERT-style encoders: BERT with a searched FFN in every layer.

Genes are stored as text, so that config.json stays readable and needs no code to load. The presets
are those of EfficientBERT (arXiv 2109.07222); their parameter counts are without heads and
without the projection that the authors use in distillation.

    preset  layers  hidden  FFN base  parameters
    base         6     540       540   15.322 M
    tiny         6     360       360    9.098 M
    ++          12     360       360   13.965 M

About "++": the authors' size table counts its FFNs 540 wide (15.695 M, published as "16M" with the
distillation projection), but their code builds and converts 360-wide ones. Their results were
measured on what the code builds, so this preset builds it too. The table's model is
`preset("++", genes=[...])` with every ratio times 3/2.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from ..errors import UserError
from ..expr import PUBLISHED, Gene
from ..layers.elastic import SupernetSize
from ..layers.ffn import check_arguments, check_positive

_PRESETS = {
    "base": {"hidden_size": 540, "num_hidden_layers": 6},
    "tiny": {"hidden_size": 360, "num_hidden_layers": 6},
    "++": {"hidden_size": 360, "num_hidden_layers": 12},
}
_PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "type_vocab_size",
    "ffn_base",
)


class EfficientBertConfig(PreTrainedConfig):
    """Everything that `EfficientBertModel` is built from.

    Args:
        vocab_size: rows of the word embedding.
        hidden_size: H, a multiple of num_attention_heads.
        num_hidden_layers: L.
        num_attention_heads: heads of self-attention, each H / heads wide.
        genes: L texts or `Gene`s. None: the six published ones, each for L / 6 layers in a row.
        ffn_base: width of an FFN over H before the gene's ratio (1 in EfficientBERT, 4 in BERT).
        embedding_size: width of the word embedding; None: H, without a projection.
        trigram: the projection sees the embeddings of the previous, this and the next token
            (MobileBERT, arXiv 2004.02984); needs an embedding_size.
        max_position_embeddings: longest sequence.
        type_vocab_size: number of segments.
        hidden_dropout_prob, attention_probs_dropout_prob, classifier_dropout: probabilities; the
            last one is hidden_dropout_prob when None.
        layer_norm_eps: of every LayerNorm.
        initializer_range: standard deviation of initial weights.
        pad_token_id: its word embedding starts as zero and gets no gradient from the encoder.
        sentence_pooling: "mean" or "cls": what `pooler_output` is; None: no such output.
        recompute: see `fastffn.FFN`.
        supernet: None, or {"max_stack": n, "max_width": I, "gated": bool}: the layers hold
            `ElasticFFN`s of that size and `genes` are the ones that run at first.
        kept_layers: of a supernet: indices of the layers that run at first, rising; None: all.

    Raises:
        UserError: a value is out of range, or the genes do not fit the layers.
        ExprError: the text of a gene is wrong.
    """

    model_type = "efficientbert"

    vocab_size: int = 30522
    hidden_size: int = 540
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    genes: list | None = None
    ffn_base: int = 1
    embedding_size: int | None = 128
    trigram: bool = True
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    sentence_pooling: str | None = None
    recompute: str = "none"
    supernet: dict | None = None
    kept_layers: list | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any):
        for name in _POSITIVE:
            check_positive(name, getattr(self, name))
        if self.genes is None:
            self.genes = published_genes(self.num_hidden_layers)
        if not isinstance(self.genes, list | tuple):
            raise UserError(f"genes: expected one text for each layer, got {self.genes!r}")
        self.genes = [self.gene_text(gene) for gene in self.genes]
        self.check()
        super().__post_init__(**kwargs)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "EfficientBertConfig":
        """The configuration called "base", "tiny" or "++", with some values replaced."""
        if name not in _PRESETS:
            raise UserError(f"preset: expected one of {', '.join(_PRESETS)}, got {name!r}")
        return cls(**(_PRESETS[name] | overrides))

    def gene_text(self, gene: Gene | str) -> str:
        """The text under which `gene` is stored; a UserError if its base is not `ffn_base`."""
        if isinstance(gene, Gene) and gene.base != self.ffn_base:
            raise UserError(f"genes: {gene} has base {gene.base}, ffn_base is {self.ffn_base}")
        return str(gene)

    def parsed_genes(self) -> list[Gene]:
        """The genes of the layers; a UserError when there is not one for each."""
        if len(self.genes) != self.num_hidden_layers:
            raise UserError(
                f"genes: {len(self.genes)} given for {self.num_hidden_layers} layers; "
                "give one for each"
            )
        return [Gene.parse(gene, base=self.ffn_base) for gene in self.genes]

    def checked_layers(self, layers: Sequence[int] | None) -> list[int] | None:
        """Indices of the layers that a supernet runs; None for all of them.

        Raises:
            UserError: none, not rising, not there, or of a model that is no supernet.
        """
        count = self.num_hidden_layers
        if layers is None or list(layers) == list(range(count)):
            return None
        kept = list(layers)
        if not kept or kept != sorted(set(kept) & set(range(count))):
            raise UserError(
                f"layers {kept}: give indices from 0 to {count - 1}, each once, in rising order"
            )
        if self.supernet is None:
            raise UserError("kept_layers: only a supernet leaves layers out")
        return kept

    def check(self) -> None:
        """Raises a UserError that names the first value which no model can be built from."""
        for name in _PROBABILITIES:
            value = getattr(self, name)
            if value is None and name == "classifier_dropout":
                continue
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise UserError(f"{name}: expected from 0 to below 1, got {value!r}")
        check_arguments(
            self.hidden_size, self.hidden_dropout_prob, self.layer_norm_eps, self.recompute
        )
        spread = self.initializer_range
        if not isinstance(spread, int | float) or not 0 <= spread < float("inf"):
            raise UserError(f"initializer_range: expected a number from 0, got {spread!r}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"num_attention_heads: {self.num_attention_heads} heads do not divide "
                f"hidden_size {self.hidden_size}"
            )
        if self.trigram and self.embedding_size is None:
            raise UserError(
                "trigram: needs an embedding_size; give one, or trigram=False for a plain embedding"
            )
        if self.embedding_size is not None:
            check_positive("embedding_size", self.embedding_size)
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise UserError(f"pad_token_id: {self.pad_token_id} is outside the vocabulary")
        if self.sentence_pooling not in (None, "mean", "cls"):
            raise UserError(
                f'sentence_pooling: expected "mean", "cls" or None, got {self.sentence_pooling!r}'
            )
        size = None if self.supernet is None else self._supernet_size()
        self.kept_layers = self.checked_layers(self.kept_layers)
        for gene in self.parsed_genes():
            gene.width(self.hidden_size)
            if size is not None:
                size.check_gene(gene)

    def _supernet_size(self) -> SupernetSize:
        """The size that `supernet` says; a UserError when it says none."""
        supernet = self.supernet
        if not isinstance(supernet, dict) or not (
            {"max_stack", "max_width"} <= set(supernet) <= {"max_stack", "max_width", "gated"}
        ):
            raise UserError(
                f"supernet: expected max_stack, max_width and perhaps gated, got {supernet!r}"
            )
        try:
            return SupernetSize(self.hidden_size, **supernet)
        except UserError as error:
            raise UserError(f"supernet: {error}") from None


def published_genes(layers: int) -> list[str]:
    """The published genes spread over `layers`, a multiple of their number."""
    if layers % len(PUBLISHED):
        raise UserError(
            f"genes: the published ones are for a multiple of {len(PUBLISHED)} layers, "
            f"not {layers}; give one gene for each layer"
        )
    return [str(gene) for gene in PUBLISHED for _ in range(layers // len(PUBLISHED))]
