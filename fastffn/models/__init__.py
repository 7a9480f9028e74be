"""Hugging Face models with searched FFNs. Importing it registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_efficientbert import EfficientBertConfig
from .heads_efficientbert import (
    EfficientBertForMaskedLM,
    EfficientBertForQuestionAnswering,
    EfficientBertForSequenceClassification,
    EfficientBertForTokenClassification,
)
from .initialise import extract, from_teacher, supernet_from_teacher
from .modeling_efficientbert import EfficientBertModel, EfficientBertPreTrainedModel

AutoConfig.register(EfficientBertConfig.model_type, EfficientBertConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, EfficientBertModel),
    (AutoModelForMaskedLM, EfficientBertForMaskedLM),
    (AutoModelForQuestionAnswering, EfficientBertForQuestionAnswering),
    (AutoModelForSequenceClassification, EfficientBertForSequenceClassification),
    (AutoModelForTokenClassification, EfficientBertForTokenClassification),
):
    _auto.register(EfficientBertConfig, _model, exist_ok=True)

__all__ = [
    "EfficientBertConfig",
    "EfficientBertForMaskedLM",
    "EfficientBertForQuestionAnswering",
    "EfficientBertForSequenceClassification",
    "EfficientBertForTokenClassification",
    "EfficientBertModel",
    "EfficientBertPreTrainedModel",
    "extract",
    "from_teacher",
    "supernet_from_teacher",
]
