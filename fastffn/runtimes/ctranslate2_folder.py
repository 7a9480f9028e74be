"""A plain encoder as a folder of ctranslate2, by that library's own converter.

The converter reads a hub-like folder with a tokenizer and a pooler, which a bare encoder has not
got. Neither matters for hidden states, so they are made up: a vocabulary of numbers, and a pooler
with the weights that transformers starts with.
"""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

from ..distill.teacher import quiet
from .contenders import Unavailable

KINDS = ("bert", "distilbert", "roberta", "camembert", "xlm-roberta")


def convert(model: Path, out: Path, quantization: str) -> None:
    """Converts the encoder that transformers saved in `model`.

    Args:
        quantization: a compute type of ctranslate2, such as "float32" or "int8".

    Raises:
        Unavailable: an architecture that the converter does not know, or does not convert.
    """
    kind = json.loads((model / "config.json").read_text(encoding="utf-8"))["model_type"]
    if kind not in KINDS:
        raise Unavailable(f"converts {', '.join(KINDS)}, not {kind}")
    import transformers
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_model(self, cls, path, **_):
            loaded = cls.from_pretrained(path, use_safetensors=True, local_files_only=True)
            # Gone from transformers' configurations, since there is no other kind any more.
            loaded.config.position_embedding_type = "absolute"
            return loaded.float()

        def load_tokenizer(self, cls, path, **_):
            size = transformers.AutoConfig.from_pretrained(path).vocab_size
            names = {f"[{number}]": number for number in range(size)}
            marks = ("unk_token", "bos_token", "eos_token", "pad_token")
            return SimpleNamespace(get_vocab=lambda: names, **dict.fromkeys(marks, "[0]"))

    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        place = Path(folder) / "converted"
        try:
            with quiet():
                Converter(str(model)).convert(str(place), quantization=quantization)
        except Exception as error:  # whatever a converter makes of a newer transformers
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Unavailable(f"does not convert it: {reason}") from error
        place.rename(out)
