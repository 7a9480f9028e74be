"""Task heads on `EfficientBertModel`, each as thin as its task allows."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from .configuration_efficientbert import EfficientBertConfig
from .modeling_efficientbert import EfficientBertModel, EfficientBertPreTrainedModel


class MaskedLMHead(nn.Module):
    """[B, T, H] -> [B, T, vocab]: dense to the width of the word embedding, gelu, LayerNorm, and
    the word embedding itself as decoder (ALBERT, arXiv 1909.11942). A decoder from H would be
    larger than the whole encoder when the embedding is factorised.
    """

    def __init__(self, config: EfficientBertConfig):
        super().__init__()
        width = config.embedding_size or config.hidden_size
        self.dense = nn.Linear(config.hidden_size, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(width, config.vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.dense(hidden_states))))


class EfficientBertForMaskedLM(EfficientBertPreTrainedModel):
    """Predicts masked tokens; labels [B, T] hold -100 where no loss is wanted."""

    _tied_weights_keys = {
        "head.decoder.weight": "efficientbert.embeddings.word_embeddings.weight",
    }

    def __init__(self, config: EfficientBertConfig):
        super().__init__(config)
        self.efficientbert = EfficientBertModel(config)
        self.head = MaskedLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.head.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: object,
    ) -> MaskedLMOutput:
        """Logits [B, T, vocab] and, with labels, the mean cross-entropy over the labelled tokens.

        `num_items_in_batch`: divides the summed loss instead (gradient accumulation in Trainer).
        """
        outputs = self.efficientbert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs
        )
        logits = self.head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class EfficientBertForSequenceClassification(EfficientBertPreTrainedModel):
    """Classifies or scores a text, or a pair, from its first token: dense, tanh, dropout, linear.

    `config.problem_type` ("regression", "single_label_classification" or
    "multi_label_classification") chooses the loss; unset, it follows from the labels.
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch: Trainer averages over steps

    def __init__(self, config: EfficientBertConfig):
        super().__init__(config)
        self.efficientbert = EfficientBertModel(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: object,
    ) -> SequenceClassifierOutput:
        """Logits [B, num_labels] and, with labels, the loss of the problem type."""
        outputs = self.efficientbert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs
        )
        first = self.dense(outputs.last_hidden_state[:, 0]).tanh()
        logits = self.classifier(self.dropout(first))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class EfficientBertForTokenClassification(EfficientBertPreTrainedModel):
    """Classifies every token: dropout, linear. Labels [B, T] hold -100 where no loss is wanted."""

    def __init__(self, config: EfficientBertConfig):
        super().__init__(config)
        self.efficientbert = EfficientBertModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: object,
    ) -> TokenClassifierOutput:
        """Logits [B, T, num_labels] and, with labels, the mean cross-entropy over labelled tokens.

        `num_items_in_batch`: divides the summed loss instead (gradient accumulation in Trainer).
        """
        outputs = self.efficientbert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, self.config, num_items_in_batch=num_items_in_batch
            )
        return TokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class EfficientBertForQuestionAnswering(EfficientBertPreTrainedModel):
    """Finds the span of a text that answers a question: two logits per token, start and end.

    The head is two wide whatever `config.num_labels` says: a configuration that once had three
    classes still makes a model of spans.
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch: Trainer averages over steps

    def __init__(self, config: EfficientBertConfig):
        super().__init__(config)
        self.efficientbert = EfficientBertModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: object,
    ) -> QuestionAnsweringModelOutput:
        """Start and end logits [B, T] each and, with positions [B], their mean cross-entropy.

        A position at T or beyond counts for nothing: its answer was cut off.
        """
        outputs = self.efficientbert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs
        )
        start, end = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start.contiguous(),
            end_logits=end.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _classifier_dropout(config: EfficientBertConfig) -> nn.Dropout:
    share = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if share is None else share)
