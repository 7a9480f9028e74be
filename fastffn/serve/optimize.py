"""`optimize`: a model as fast as it goes on its device, for inference.

On a CPU the encoder inside becomes csrc's (`packed_encoder`): no work for padding, query, key and
value as one product, weights packed once, one call a batch. What cannot be packed keeps torch's
modules with fastffn's feed-forward parts (`models.patch`) and runs texts of like length together
(`grouped`). On a CUDA device the patched model is replayed as graphs (`graphs`).
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.architectures import encoders
from ..models.patch import patch
from .graphs import Graphed
from .grouped import Grouped, by_token
from .packed_encoder import PackedEncoder
from .packing import NotPackable

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_MADE = (PackedEncoder, Grouped, Graphed)
_TEXTS, _TOKENS = 8, 48  # of the sample that accuracy is measured on, if none is given


@dataclass(frozen=True)
class Report:
    """What `optimize` made, and how far its outputs are from the model's in float32.

    Attributes:
        engine: "csrc" (packed, without padding), "torch" or "cuda-graphs".
        precision: of the weights: float32, bfloat16, float16 or int8.
        why: why the engine is not csrc; "" where it is.
        output: the output that was compared, such as "logits".
        largest: the largest difference, over the largest number of the output.
        typical: root mean square of the difference over that of the output.
        agreement: of logits, the share of rows with the same largest one; else None.
    """

    engine: str
    precision: str
    why: str
    output: str
    largest: float
    typical: float
    agreement: float | None

    def __str__(self) -> str:
        same = "" if self.agreement is None else f", same answer in {self.agreement:.1%}"
        why = f" ({self.why})" if self.why else ""
        return (
            f"{self.engine}, {self.precision}{why}; {self.output} against float32: "
            f"typically {self.typical:.1e}, at most {self.largest:.1e} off{same}"
        )


def optimize(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    unpad: bool = True,
    sample: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A model for inference that is called as the given one and gives the same outputs, faster.

    The given model is not changed and may be let go. Any number of threads may call the result.
    Embeddings and heads share memory with the given model, where their type stays; packed layers
    are copies. Do not change the given model's weights while the result serves: it would be half
    old and half new. Optimise again after training.

    Args:
        model: an encoder of `models.architectures.ALL`, or of fastffn, with any head, or something
            that holds one, such as a SentenceTransformer.
        dtype: of the weights: float32, bfloat16 (norms, sums and attention stay in float32 where
            csrc computes), or on a CUDA device float16. None: as they are.
        quantize: "int8": weights in 8 bits, activations too, scaled for each row as it comes; CPU.
        unpad: leave padding out. False runs a batch as it is given.
        sample: a batch to compare both on, as the model takes it; None: random tokens.

    Returns:
        The model, with its `Report` as `report`. Outputs of csrc are float32; padding is zero.

    Raises:
        UserError: no encoder that is known, a model that is optimised already, a type that this
            processor does not multiply, an unknown `quantize`, a model that does not take random
            tokens where no sample is given.
    """
    if any(isinstance(module, _MADE) for module in model.modules()):
        raise UserError(
            "the model is optimised already; for other options give the one it was made from"
        )
    encoders(model)  # refuses what is not known
    dtype = dtype or next(model.parameters()).dtype
    if dtype not in _DTYPES:
        raise UserError(f"dtype: {dtype}; take torch.float32 or torch.bfloat16")
    if quantize not in (None, "int8"):
        raise UserError(f'quantize: expected None or "int8", got {quantize!r}')
    device = next(model.parameters()).device
    precision = quantize or _DTYPES[dtype]
    if device.type == "cuda":
        if quantize:
            raise UserError('quantize: "int8" is for the CPU; on a GPU take dtype=torch.bfloat16')
        made, engine, why = _around(_patched(model, dtype), Graphed), "cuda-graphs", ""
    else:
        made, engine, why = _on_cpu(model, dtype, precision, unpad)
    made.eval()
    report = _compared(model, made, sample, engine, precision, why)
    made.report = report
    return made


def _on_cpu(model: nn.Module, dtype: torch.dtype, precision: str, unpad: bool):
    """The model, its engine, and why that is not csrc."""
    why = "csrc has no float16" if unpad else "padding is kept"
    if unpad and precision != "float16":
        try:
            made = _shallow(model).float()
            return _replaced(made, lambda base: PackedEncoder(base, precision)), "csrc", ""
        except NotPackable as error:
            why = str(error)
    if precision == "int8":
        raise UserError(
            f"quantize: int8 needs csrc, and {why}; export to ONNX with int8 instead "
            '(fastffn.export(model, folder, "onnx", quantize="int8"))'
        )
    if precision != "float32" and not _multiplies(dtype):
        raise UserError(f"dtype: this processor does not multiply {dtype}; take torch.float32")
    made = _patched(model, dtype)
    return _around(made, Grouped) if unpad else made, "torch", why


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether products of this type are faster than float32's on this CPU."""
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _shallow(model: nn.Module) -> nn.Module:
    """The modules again, with the same memory, for inference."""
    memo = {id(x): nn.Parameter(x.detach(), requires_grad=False) for x in model.parameters()}
    memo |= {id(x): x for x in model.buffers()}
    return copy.deepcopy(model, memo).eval()


def _patched(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return patch(_shallow(model).to(dtype))


def _around(made: nn.Module, wrapper: type[nn.Module]) -> nn.Module:
    """The wrapper around a model, or inside of what is not called as a model is."""
    whole = hasattr(made, "config") and not _takes_features(made)
    return wrapper(made) if whole else _replaced(made, wrapper)


def _takes_features(model: nn.Module) -> bool:
    """A SentenceTransformer takes one dictionary."""
    return isinstance(model, nn.Sequential)


def _replaced(made: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The model with other encoders inside."""
    modules = list(made.named_modules(remove_duplicate=False))  # one may go by several names
    for encoder in encoders(made):
        other = make(encoder.base)
        for name in [name for name, module in modules if module is encoder.base]:
            if not name:
                return other
            place, _, last = name.rpartition(".")
            setattr(made.get_submodule(place), last, other)
    return made


def _compared(
    model: nn.Module,
    made: nn.Module,
    sample: Mapping[str, Tensor] | None,
    engine: str,
    precision: str,
    why: str,
) -> Report:
    exact = _shallow(model).float()
    with torch.no_grad():
        output, sample = _exact(exact, sample)
        name, want = _first(output)
        got = _called(made, sample)[name]
        mask = sample.get("attention_mask")
        if mask is not None and mask.dim() == 2:  # of padding, and of texts without tokens,
            forms = by_token(lambda part: _called(exact, part), sample, *mask.shape)
            real = mask != 0 if forms.get(name) else mask.any(1)  # nothing is said
            want, got = want[real], got[real]
    want, got = want.float(), got.float()
    difference = got - want
    agreement = None
    if name == "logits" and want.dim() > 1 and want.shape[-1] > 1:
        agreement = (want.argmax(-1) == got.argmax(-1)).float().mean().item()
    return Report(
        engine,
        precision,
        why,
        name,
        (difference.abs().max() / want.abs().max()).item(),
        (difference.square().mean() / want.square().mean()).sqrt().item(),
        agreement,
    )


def _exact(model: nn.Module, sample: Mapping[str, Tensor] | None):
    """The given model's outputs, and the sample they are of."""
    if sample is not None:
        return _called(model, sample), sample
    sample = _sample(model)
    try:
        return _called(model, sample), sample
    except Exception as error:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in sample.items())
        why = str(error).partition("\n")[0]
        raise UserError(
            f"sample: {type(model).__name__} does not take {shapes} ({why}); "
            "give a batch as the model takes it"
        ) from error


def _called(model: nn.Module, sample: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Outputs by name; without one, by number."""
    if _takes_features(model):
        return model(dict(sample))
    config = getattr(model, "config", None)
    named = {} if getattr(config, "return_dict", True) else {"return_dict": True}
    output = model(**sample, **named)
    if isinstance(output, Mapping):
        return output
    output = output if isinstance(output, tuple) else (output,)
    return {f"output {k}": value for k, value in enumerate(output)}


def _first(output: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """The output that counts, with its name; a loss is not one."""
    for name, value in output.items():
        if torch.is_tensor(value) and value.is_floating_point() and value.dim() > 0:
            return name, value
    raise UserError("sample: the model gives no numbers to compare")


def _sample(model: nn.Module) -> dict[str, Tensor]:
    """Random tokens in texts of different lengths."""
    base = encoders(model)[0].base
    device = next(model.parameters()).device
    if not hasattr(base.config, "vocab_size"):
        size, channels = base.config.image_size, base.config.num_channels
        generator = torch.Generator().manual_seed(0)
        return {
            "pixel_values": torch.randn(2, channels, size, size, generator=generator).to(device)
        }
    generator = torch.Generator().manual_seed(0)
    longest = min(_TOKENS, base.config.max_position_embeddings - 2)
    ids = torch.randint(base.config.vocab_size, (_TEXTS, longest), generator=generator)
    lengths = torch.linspace(longest, 1, _TEXTS).long()
    mask = (torch.arange(longest) < lengths[:, None]).long()
    padding = base.config.pad_token_id or 0
    ids[ids == padding] = (padding + 1) % base.config.vocab_size
    ids[mask == 0] = padding
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
