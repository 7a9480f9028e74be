"""Less padding for a model that knows texts only as padded batches: like lengths run together.

A batch is cut into groups of texts of about one length, each run without the columns that are
padding to all of it, and the outputs are put together again. For what csrc cannot pack
(`packing`), and for runtimes that take padded batches only.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

_STEP = 32  # lengths of one group differ by less
# Outputs [B, T]; others of two dimensions are [B, C], where C may be T by chance.
BY_TOKEN = ("start_logits", "end_logits")


class Grouped(nn.Module):
    """A model on groups of texts of like length.

    Args:
        model: takes tensors [B, ..] by name, one of them `attention_mask` [B, T] with 0 at padding
            behind the text, and gives a mapping (transformers' outputs are one) of tensors
            [B, ..]. What gives something else besides, such as a loss, runs the batch as it is.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def __getattr__(self, name: str):
        """What this module does not have, the model has: config, dtype, device .."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *inputs: Tensor, **named: object):
        """As the model's own; padded positions of outputs [B, T, ..] are zero."""
        mask = named.get("attention_mask")
        if inputs or mask is None or mask.dim() != 2 or _is_holed(mask):
            return self.model(*inputs, **named)
        batch, length = mask.shape
        lengths = mask.ne(0).sum(1)
        if batch == 0 or int(lengths.min()) == length:
            return self.model(**named)
        whole: dict[str, Tensor] = {}
        output = None
        for rows, longest in _groups(lengths):
            part = {name: _cut(x, rows, batch, length, longest) for name, x in named.items()}
            output = self.model(**part)
            if not _can_be_joined(output, len(rows)):
                return self.model(**named)
            for name, value in output.items():
                _put(whole, name, value, rows, batch, length, longest)
        return type(output)(**whole)


def _is_holed(mask: Tensor) -> bool:
    real = mask != 0
    return bool((real[:, 1:] > real[:, :-1]).any())


def _can_be_joined(output: object, rows: int) -> bool:
    return isinstance(output, Mapping) and all(
        torch.is_tensor(value) and value.dim() > 0 and value.shape[0] == rows
        for value in output.values()
    )


def _groups(lengths: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Numbers of the texts of each group, and its longest length, 1 or more."""
    steps = (lengths + _STEP - 1) // _STEP
    for step in steps.unique():
        rows = (steps == step).nonzero().flatten()
        yield rows, max(1, int(lengths[rows].max()))


def _cut(x: object, rows: Tensor, batch: int, length: int, longest: int) -> object:
    if not torch.is_tensor(x) or x.dim() == 0 or x.shape[0] not in (1, batch):
        return x
    x = x[rows] if x.shape[0] == batch else x
    return x[:, :longest] if x.dim() > 1 and x.shape[1] == length else x


def is_by_token(name: str, value: Tensor, length: int) -> bool:
    """Whether an output is [B, T, ..]."""
    many = value.dim() > 2 or (value.dim() == 2 and name in BY_TOKEN)
    return many and value.shape[1] == length


def _put(whole, name: str, value: Tensor, rows: Tensor, batch: int, length: int, longest: int):
    """Puts a group's output among those of the batch."""
    by_token = is_by_token(name, value, longest)
    rest = (length, *value.shape[2:]) if by_token else tuple(value.shape[1:])
    if name not in whole:
        whole[name] = value.new_zeros(batch, *rest)
    if by_token:
        whole[name][rows, :longest] = value
    else:
        whole[name][rows] = value
