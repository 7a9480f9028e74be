"""Tiny models with a tokenizer, to be exported: a fastffn classifier, and a BERT with 4 layers."""

import torch
import transformers
from tiny_teacher import WORDS, save_teacher

from fastffn.models import EfficientBertConfig, EfficientBertForSequenceClassification

GENES = ["2x1/2 tanh(down(gelu(up(x))))", "1x1 down(mul(swish(gate(x)), up(x)))"]
TEXTS = [
    f"{WORDS[0]} {WORDS[3]} .",
    " ".join(WORDS[4:12]),
    "",
    " ".join(WORDS[:20] * 3),  # beyond the positions
    WORDS[5],
]


def tokenizer(folder):
    """The tokenizer of `save_teacher`, made in a folder."""
    save_teacher(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def spread(model):
    """The model with larger weights: the usual initial ones make all texts alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.eval()


def classifier(labels=("bad", "good"), **changes):
    """An EfficientBERT with a head for classes of texts, in the vocabulary of `tokenizer`."""
    torch.manual_seed(0)
    config = EfficientBertConfig(
        vocab_size=6 + len(WORDS),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        genes=GENES,
        embedding_size=8,
        max_position_embeddings=32,
        id2label=dict(enumerate(labels)),
        label2id={label: k for k, label in enumerate(labels)},
        **changes,
    )
    model = spread(EfficientBertForSequenceClassification(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zeros hide an absent bias
                parameter.normal_(std=0.1)
    return model
