"""EfficientBERT-style encoders for Hugging Face: BERT's attention, a searched FFN in every layer.

    input_ids [B, T] -> embeddings [B, T, H] -> L x (attention, FFN) -> [B, T, H]

One layer is a = LayerNorm(h + Dropout(attention(h))), h' = FFN(a), where `fastffn.FFN` has its own
residual and LayerNorm. With `config.supernet` the layers hold `fastffn.ElasticFFN`s instead.

Why not a subclass of transformers' BERT: its layer is built around two dense modules and an
activation name, and its embeddings cannot be factorised; what would remain shared is the
attention, which Hugging Face exposes as an interface of its own.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.output_capturing import capture_outputs

from ..errors import UserError
from ..expr import Gene
from ..functional import residual_norm
from ..layers import FFN, ElasticFFN
from ..layers.ffn import as_gene, is_plain
from .configuration_efficientbert import EfficientBertConfig


class EfficientBertEmbeddings(nn.Module):
    """Word (plain, factorised or trigram), position and segment embeddings, LayerNorm, dropout.

    Trigram (MobileBERT, arXiv 2004.02984): each token is the concatenation of the embeddings of
    the previous, this and the next token, projected to H. Beyond either end of the sequence stand
    zeros, and padding counts as beyond it: a sentence has the same output in whatever batch.
    """

    def __init__(self, config: EfficientBertConfig):
        super().__init__()
        hidden, width = config.hidden_size, config.embedding_size
        self.trigram = config.trigram
        self.word_embeddings = nn.Embedding(
            config.vocab_size, width or hidden, padding_idx=config.pad_token_id
        )
        self.projection = nn.Linear(width * (3 if self.trigram else 1), hidden) if width else None
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Token ids [B, T] or word embeddings [B, T, E] -> [B, T, H]; mask [B, T], 0 at padding."""
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        length, longest = words.shape[1], self.position_embeddings.num_embeddings
        if length == 0:
            raise UserError("input_ids: texts of 0 tokens; keep at least one, such as [CLS]")
        if length > longest:
            raise UserError(
                f"input_ids: {length} tokens, the model has {longest} positions; truncate the text"
            )
        if self.trigram:
            if attention_mask is not None and attention_mask.dim() == 2:
                words = words * attention_mask.unsqueeze(-1).to(words.dtype)
            around = F.pad(words, (0, 0, 1, 1))
            words = torch.cat((around[:, :-2], words, around[:, 2:]), dim=-1)
        if self.projection is not None:
            words = self.projection(words)
        if position_ids is None:
            positions = self.position_embeddings.weight[:length]
        else:
            positions = self.position_embeddings(position_ids)
        if token_type_ids is None:
            segments = self.token_type_embeddings.weight[0]
        else:
            segments = self.token_type_embeddings(token_type_ids)
        return self.dropout(self.norm(words + positions + segments))


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Attention that also returns its probabilities; [B, heads, T, D] -> ([B, T, heads, D], ...).

    The mask may be additive or, as the fused implementations take it, boolean (True: attend).
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    probabilities = F.dropout(scores.softmax(-1), dropout, module.training)
    return (probabilities @ value).transpose(1, 2), probabilities


class EfficientBertAttention(nn.Module):
    """Self-attention with output product, residual and LayerNorm; [B, T, H] -> [B, T, H].

    Runs `config._attn_implementation` ("sdpa" unless chosen), and the eager form whenever the
    attention probabilities are asked for, which no fused form returns, and for a batch of no
    texts, which transformers' fused forms cannot shape.
    """

    is_causal = False  # read by the attention implementations

    def __init__(self, config: EfficientBertConfig):
        super().__init__()
        hidden = config.hidden_size
        self.config = config
        self.heads = config.num_attention_heads
        self.head_size = hidden // config.num_attention_heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None]:
        heads = (*hidden_states.shape[:-1], self.heads, self.head_size)
        query, key, value = (
            layer(hidden_states).view(heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        if kwargs.get("output_attentions") or hidden_states.shape[0] == 0:
            attend = eager_attention
        mixed, probabilities = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=self.head_size**-0.5,
            **kwargs,
        )
        output = self.output(mixed.reshape(hidden_states.shape))
        norm, dropout = self.norm, self.dropout
        if is_plain(norm, nn.LayerNorm) and is_plain(dropout, nn.Dropout) and dropout.p < 1:
            share = dropout.p if dropout.training else 0.0
            output = residual_norm(output, hidden_states, norm.weight, norm.bias, share, norm.eps)
        else:  # hooks or replacements: the modules are called
            output = norm(hidden_states + dropout(output))
        return output, probabilities


class EfficientBertLayer(GradientCheckpointingLayer):
    """Attention and the searched FFN, each with its residual and LayerNorm."""

    def __init__(self, config: EfficientBertConfig, gene: Gene):
        super().__init__()
        self.attention = EfficientBertAttention(config)
        options = {
            "dropout": config.hidden_dropout_prob,
            "layer_norm_eps": config.layer_norm_eps,
            "recompute": config.recompute,
        }
        if config.supernet is None:
            self.ffn = FFN(config.hidden_size, gene, **options)
        else:
            self.ffn = ElasticFFN(config.hidden_size, **config.supernet, **options)
            self.ffn.set_gene(gene)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: object
    ) -> Tensor:
        hidden_states, _ = self.attention(hidden_states, attention_mask, **kwargs)
        return self.ffn(hidden_states)


class EfficientBertEncoder(nn.Module):
    """The layers, one after the other; of a supernet those in `kept`, None: all."""

    def __init__(self, config: EfficientBertConfig):
        super().__init__()
        self.kept = config.kept_layers
        self.layer = nn.ModuleList(
            EfficientBertLayer(config, gene) for gene in config.parsed_genes()
        )

    def walk(self) -> list[tuple[int, EfficientBertLayer]]:
        """The layers that a forward runs, each with its index."""
        kept = self.kept
        return [(k, layer) for k, layer in enumerate(self.layer) if kept is None or k in kept]

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: object
    ) -> Tensor:
        for _, layer in self.walk():
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return hidden_states


class EfficientBertPreTrainedModel(PreTrainedModel):
    """What all EfficientBERT models share: configuration, initial weights, what can be recorded."""

    config: EfficientBertConfig
    config_class = EfficientBertConfig
    base_model_prefix = "efficientbert"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["EfficientBertEmbeddings", "EfficientBertLayer"]
    _can_record_outputs = {
        "hidden_states": EfficientBertLayer,
        "attentions": EfficientBertAttention,
    }

    def set_genes(self, genes: Sequence[Gene | str], layers: Sequence[int] | None = None) -> None:
        """Makes a supernet run these genes from now on, and its config say so.

        Args:
            genes: one for each layer that runs.
            layers: indices of the layers that run, rising (elastic depth: DynaBERT, arXiv
                2004.04037); None: all. The others hand on what they get.

        Raises:
            UserError: the model is no supernet, a gene does not fit it, or layers that it does not
                have; then nothing changes.
        """
        encoder, config = self.base_model.encoder, self.config
        if config.supernet is None:
            raise UserError("set_genes: the model is no supernet; its FFNs have fixed genes")
        kept = config.checked_layers(layers)
        running = [encoder.layer[k] for k in kept or range(config.num_hidden_layers)]
        if len(genes) != len(running):
            raise UserError(f"genes: {len(genes)} given for {len(running)} layers")
        genes = [as_gene(gene, config.ffn_base) for gene in genes]
        texts = dict(zip(running, (config.gene_text(gene) for gene in genes), strict=True))
        checked = [layer.ffn.check_gene(gene) for layer, gene in zip(running, genes, strict=True)]
        for layer, gene in zip(running, checked, strict=True):
            layer.ffn.set_gene(gene)
        config.genes = [
            texts.get(layer, text) for layer, text in zip(encoder.layer, config.genes, strict=True)
        ]
        encoder.kept = config.kept_layers = kept


class EfficientBertModel(EfficientBertPreTrainedModel):
    """The encoder without a head.

    `pooler_output` is the sentence vector [B, H] that `config.sentence_pooling` names (mean over
    the tokens of the mask, or the first token), without weights of its own; None without it.
    """

    def __init__(self, config: EfficientBertConfig):
        super().__init__(config)
        self.embeddings = EfficientBertEmbeddings(config)
        self.encoder = EfficientBertEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPooling:
        """Encodes a batch.

        Args:
            input_ids: token ids [B, T], or else `inputs_embeds` [B, T, embedding_size or H].
            attention_mask: [B, T], 1 at tokens and 0 at padding; None: no padding.
            token_type_ids, position_ids: [B, T]; None: segment 0, and 0 to T - 1.
            kwargs: output_hidden_states, output_attentions, return_dict, and what the attention
                implementation takes.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("input_ids: give either input_ids or inputs_embeds")
        hidden_states = self.embeddings(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        )
        bias = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        hidden_states = self.encoder(hidden_states, bias, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=self.pool(hidden_states, attention_mask),
        )

    def pool(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor | None:
        """Sentence vectors [B, H] of hidden states [B, T, H] by `config.sentence_pooling`.

        Raises:
            UserError: a mean by an attention_mask that is not [B, T].
        """
        if self.config.sentence_pooling is None:
            return None
        if self.config.sentence_pooling == "cls":
            return hidden_states[:, 0]
        if attention_mask is None:
            return hidden_states.mean(1)
        if attention_mask.dim() != 2:
            raise UserError(
                f"attention_mask: a mean over the tokens needs a mask [B, T], got "
                f'{list(attention_mask.shape)}; give one, or sentence_pooling=None or "cls"'
            )
        weights = attention_mask.unsqueeze(-1).to(hidden_states.dtype)
        return (hidden_states * weights).sum(1) / weights.sum(1).clamp(min=1)
