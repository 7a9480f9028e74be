"""Tiny random encoders of every architecture that patch knows, with what they read."""

import torch
import transformers
from encoders import HEADS, KNOWN, LAYERS, VOCABULARY, WIDTH, batch, encoder
from transformers.models.auto.modeling_auto import AutoModel

PATCHED = (*(kind for kind in KNOWN if kind != "efficientbert"), "albert", "vit")
PRE_NORM = ("megatron-bert", "modernbert", "roberta-prelayernorm", "vit", "xlm-roberta-xl")
_SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
}
_MORE = {
    "albert": (transformers.AlbertConfig, {"vocab_size": VOCABULARY, "embedding_size": 8}),
    "vit": (transformers.ViTConfig, {"image_size": 24, "patch_size": 8}),
}


def model(kind, head="", attention="eager", **changes):
    """As `encoders.encoder`, of two kinds more."""
    if kind not in _MORE:
        return encoder(kind, head, attention, **changes)
    torch.manual_seed(0)
    cls, sizes = _MORE[kind]
    config = cls(**{**_SIZES, **sizes, **changes})
    auto = getattr(transformers, f"AutoModel{head}") if head else AutoModel
    made = auto.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
    return made.eval()


def inputs(kind):
    if kind != "vit":
        return batch()
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(2, 3, 24, 24)}


def without_dropout(model):
    """In training mode, with nothing random in it."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for module in model.modules():  # probabilities that attention reads elsewhere
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model.train()
