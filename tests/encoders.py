"""Tiny random encoders of every architecture that capture knows, without downloads."""

import torch
import transformers
from transformers.models.data2vec.configuration_data2vec_text import Data2VecTextConfig

from fastffn.models import EfficientBertConfig

LAYERS, WIDTH, HEADS, VOCABULARY = 3, 32, 4, 60
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
_DEBERTA = {  # as the large checkpoints are: projections shared with positions, a convolution
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 8,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "conv_kernel_size": 3,
    "position_biased_input": False,
    "type_vocab_size": 0,
}
_GENES = ["1x1 down(gelu(up(x)))"] * LAYERS
_CLASSES = {
    "bert": (transformers.BertConfig, {}),
    "camembert": (transformers.CamembertConfig, {}),
    "data2vec-text": (Data2VecTextConfig, {}),
    "deberta-v2": (transformers.DebertaV2Config, _DEBERTA),
    "distilbert": (transformers.DistilBertConfig, {"hidden_dim": 48}),
    "efficientbert": (EfficientBertConfig, {"genes": _GENES, "embedding_size": 8}),
    "electra": (transformers.ElectraConfig, {"embedding_size": 8}),
    "ernie": (transformers.ErnieConfig, {}),
    "megatron-bert": (transformers.MegatronBertConfig, {}),
    "modernbert": (transformers.ModernBertConfig, {"global_attn_every_n_layers": 2}),
    "mpnet": (transformers.MPNetConfig, {}),
    "roberta": (transformers.RobertaConfig, {}),
    "roberta-prelayernorm": (transformers.RobertaPreLayerNormConfig, {}),
    "xlm-roberta": (transformers.XLMRobertaConfig, {}),
    "xlm-roberta-xl": (transformers.XLMRobertaXLConfig, {}),
}
KNOWN = tuple(_CLASSES)


def config(kind, **changes):
    cls, more = _CLASSES[kind]
    if kind == "modernbert":
        more = {**more, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    sizes = _SIZES
    if kind == "efficientbert":
        sizes = {key: value for key, value in _SIZES.items() if key != "intermediate_size"}
    return cls(**{**sizes, **more, **changes})


def encoder(kind, head="", attention="eager", **changes):
    """An encoder, with the head of `transformers.AutoModel<head>`; in evaluation mode."""
    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModel{head}")
    model = auto.from_config(config(kind, **changes), attn_implementation=attention)
    with torch.no_grad():  # the usual initial weights make attention uniform
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
    return model.eval()


def batch(length=9, shortest=5):
    """Two texts, the second padded on the right."""
    torch.manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (2, length))
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, shortest:] = 0
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}
