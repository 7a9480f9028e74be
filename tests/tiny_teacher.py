"""A tiny random BERT with a real tokenizer, and a little text: a whole run takes seconds."""

import random
from pathlib import Path

import torch
import transformers

WORDS = [f"{a}{b}" for a in ("ba", "do", "ki", "lu", "me", "no") for b in ("ra", "ti", "su", "vo")]


def save_teacher(directory: Path, **sizes) -> Path:
    """A BERT with 4 layers of 24, saved with its tokenizer."""
    directory.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]
    (directory / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    values = {
        "vocab_size": len(vocabulary),
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 32,
    }
    torch.manual_seed(1)
    model = transformers.BertModel(transformers.BertConfig(**(values | sizes)))
    with torch.no_grad():  # the usual initial weights make all sentences alike
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    model.save_pretrained(directory)
    transformers.BertTokenizer(str(directory / "vocab.txt")).save_pretrained(directory)
    return directory


def write_text(path: Path, sentences: int = 300) -> Path:
    """Random sentences of 4 to 12 words, in paragraphs of five."""
    rng = random.Random(0)
    lines = [
        " ".join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize() + "."
        for _ in range(sentences)
    ]
    paragraphs = [" ".join(lines[k : k + 5]) for k in range(0, len(lines), 5)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path
