"""The op `fastffn::ragged_attention`: attention over sequences without padding, for inference.

Of each head of each sequence

    out = softmax(scale Q K^T + bias) V

where the sequences' tokens lie one after the other in the rows of query, key and value: an encoder
that drops padding before its first layer has them so, and no product, exponential or copy is spent
on what a mask would hide.

On a CPU csrc/cpu/attention.h computes float32 and bfloat16; scores of a few queries at a time stay
in the cache. Everything else is served by torch, sequence by sequence (attention_reference.py).
"""

import torch
from torch import Tensor

from ..errors import UserError
from . import attention_reference as oracle
from . import backend
from .elementwise import is_decomposed, is_plain
from .execute import DTYPES, in_memory

_library = torch.library.Library("fastffn", "FRAGMENT")
_library.define(
    "ragged_attention(Tensor query, Tensor key, Tensor value, Tensor starts, int heads, "
    "float scale, Tensor? bias) -> Tensor"
)
_NATIVE = (torch.float32, torch.bfloat16)


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    heads: int,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of each sequence's tokens to each other.

    Args:
        query, key, value: [tokens, heads * head size], of one floating-point type and device; rows
            may lie apart, as thirds of one packed projection do. 16-bit types are computed in
            float32.
        starts: int64 [sequences + 1], where sequences begin: 0, .., number of tokens. A sequence
            may be empty.
        scale: of the scores; None: 1 / sqrt(head size).
        bias: [heads, length, length] of any floating-point type, added to the scores; length is at
            least that of the longest sequence, shorter ones take the first rows and columns. None:
            nothing is added.

    Returns:
        [tokens, heads * head size], contiguous, of the type of query. Equal inputs give equal bits
        on any number of threads.

    Raises:
        UserError: shapes, types or devices that do not fit; starts that do not rise from 0 to the
            number of tokens; or gradients are asked for: the op has none.
    """
    _check(query, key, value, starts, heads, bias)
    scale = (query.shape[1] // heads) ** -0.5 if scale is None else float(scale)
    arguments = query, key, value, starts, heads, scale, bias
    if is_decomposed():
        return oracle.ragged_attention(*arguments)
    operands = [x for x in (query, key, value, starts, bias) if x is not None]
    return _inference(*arguments) if _is_direct(operands) else _op(*arguments)


def _is_direct(operands: list[Tensor]) -> bool:
    return is_plain(operands) and not _wants_gradient(operands)


def _wants_gradient(operands: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in operands)


def _check(query, key, value, starts, heads, bias) -> None:
    if query.dim() != 2 or key.shape != query.shape or value.shape != query.shape:
        shapes = ", ".join(str(list(x.shape)) for x in (query, key, value))
        raise UserError(
            f"attention: query, key and value are {shapes}; expected [tokens, width] for all three"
        )
    if heads < 1 or query.shape[1] % heads or not query.shape[1]:
        raise UserError(
            f"attention: a width of {query.shape[1]} does not divide into {heads} heads"
        )
    if not query.dtype.is_floating_point or any(x.dtype != query.dtype for x in (key, value)):
        types = ", ".join(str(x.dtype) for x in (query, key, value))
        raise UserError(
            f"attention: query, key and value are {types}; expected one floating-point type"
        )
    if starts.dtype != torch.int64 or starts.dim() != 1 or not starts.numel():
        raise UserError(
            f"attention: starts is {starts.dtype} {list(starts.shape)}, "
            "expected int64 [sequences + 1]"
        )
    if bias is not None and (bias.dim() != 3 or bias.shape[0] != heads):
        raise UserError(
            f"attention: bias is {list(bias.shape)}, expected [{heads}, length, length]"
        )
    if bias is not None and bias.shape[1] != bias.shape[2]:
        raise UserError(f"attention: bias is {list(bias.shape)}; its last two sizes differ")
    for name, x in (("key", key), ("value", value), ("starts", starts), ("bias", bias)):
        if x is not None and x.device != query.device:
            raise UserError(
                f"attention: query is on {query.device} and {name} on {x.device}; move one"
            )


def _is_native(query: Tensor, heads: int) -> bool:
    module = backend.cpp()[0]
    return (
        module is not None
        and query.is_cpu
        and query.dtype in _NATIVE
        and query.shape[1] // heads <= module.MAX_HEAD_SIZE
    )


def _dense_rows(x: Tensor) -> Tensor:
    x = in_memory(x)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _rows(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.stride(0)


def _inference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    heads: int,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    if not _is_native(query, heads):
        return oracle.ragged_attention(query, key, value, starts, heads, scale, bias)
    starts = starts.contiguous()
    query, key, value = (_dense_rows(x) for x in (query, key, value))
    if bias is not None:
        bias = in_memory(bias).to(torch.float32)
        bias = bias if bias.stride(2) == 1 else bias.contiguous()
    out = query.new_empty(query.shape)
    tokens, width = query.shape
    try:
        backend.cpp()[0].attention(
            DTYPES[query.dtype],
            *(_rows(x) for x in (query, key, value, out)),
            tokens,
            heads,
            width // heads,
            starts.data_ptr(),
            starts.numel() - 1,
            scale,
            0 if bias is None else bias.data_ptr(),
            (0, 0) if bias is None else bias.stride()[:2],
            0 if bias is None else bias.shape[2],
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return out


def _autograd(query, key, value, starts, heads, scale, bias) -> Tensor:
    if _wants_gradient([x for x in (query, key, value, bias) if x is not None]):
        raise UserError(
            "attention: ragged_attention has no gradient; call it under torch.no_grad(), or train "
            "with torch.nn.functional.scaled_dot_product_attention"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return _op(query, key, value, starts, heads, scale, bias)


def _fake(query, key, value, starts, heads, scale, bias) -> Tensor:
    return query.new_empty(query.shape)


for _device in ("CPU", "CUDA", "CompositeExplicitAutograd"):
    _library.impl("ragged_attention", _inference, _device)
_library.impl("ragged_attention", _autograd, "Autograd")
torch.library.register_fake("fastffn::ragged_attention", _fake, lib=_library)
_op = torch.ops.fastffn.ragged_attention.default
