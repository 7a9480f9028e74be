"""Less padding for a model that knows texts only as padded batches: like lengths run together.

A batch is cut into groups of texts of about one length, each run without the columns that are
padding to all of it, and the outputs are put together again. For what csrc cannot pack
(`packing`), and for runtimes that take padded batches only.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

_STEP = 32  # lengths of one group differ by less


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
        self._forms: dict[tuple[str, ...], dict[str, bool | None]] = {}  # by the outputs' names

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
        if batch == 0 or int(lengths.min()) == length or not _all_of(batch, named):
            return self.model(**named)
        whole: dict[str, Tensor] = {}
        output = None
        for rows, longest in _groups(lengths):
            output = self.model(**_part(named, batch, length, rows, slice(longest)))
            forms = self._forms_of(output, named, batch, length)
            if None in forms.values():
                return self.model(**named)
            for name, value in output.items():
                _put(whole, value, name, forms[name], rows, batch, length)
        return type(output)(**whole)

    def _forms_of(self, output: object, named: dict, batch: int, length: int):
        """`by_token`, once for each set of outputs."""
        names = tuple(output) if isinstance(output, Mapping) else ()
        if names not in self._forms:
            self._forms[names] = by_token(lambda part: self.model(**part), named, batch, length)
        return self._forms[names]


def _is_holed(mask: Tensor) -> bool:
    real = mask != 0
    return bool((real[:, 1:] > real[:, :-1]).any())


def _all_of(batch: int, named: Mapping[str, object]) -> bool:
    """Whether all tensors are of that many texts, or one for all of them."""
    tensors = [x for x in named.values() if torch.is_tensor(x)]
    return all(x.dim() > 0 and x.shape[0] in (1, batch) for x in tensors)


def _groups(lengths: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Numbers of the texts of each group, and its longest length, 1 or more."""
    steps = (lengths + _STEP - 1) // _STEP
    for step in steps.unique():
        rows = (steps == step).nonzero().flatten()
        yield rows, max(1, int(lengths[rows].max()))


def _part(
    named: Mapping[str, object], batch: int, length: int, rows: Tensor, columns: Tensor | slice
) -> dict[str, object]:
    """Some texts of a batch, and of those some tokens."""

    def cut(x: object) -> object:
        if not torch.is_tensor(x) or x.dim() == 0:
            return x
        x = x[rows] if x.shape[0] == batch else x
        return x[:, columns] if x.dim() > 1 and x.shape[1] == length else x

    return {name: cut(x) for name, x in named.items()}


def by_token(
    call: Callable[[dict], object], named: Mapping[str, object], batch: int, length: int
) -> dict[str, bool | None]:
    """For each output of a model: True, it is [B, T, ..]; False, [B, ..]; None, neither.

    Neither are a loss, a tuple of hidden states, scores [B, T, T]; and what has no names at all.
    Told from two texts of two tokens and three of three, made of the batch's first one, and not
    from one output's shape: [B, C] of C classes may be [B, T] by chance.
    """
    sizes = []
    for count in (2, 3):
        first = torch.zeros(count, dtype=torch.long)
        output = call(_part(named, batch, length, first, first))
        output = output if isinstance(output, Mapping) else {"": None}
        sizes.append({name: getattr(x, "shape", ()) for name, x in output.items()})
    return {name: _form(tuple(x), tuple(sizes[1].get(name, ()))) for name, x in sizes[0].items()}


def _form(two: tuple[int, ...], three: tuple[int, ...]) -> bool | None:
    if three[:1] != (3,) or two[:1] != (2,):
        return None
    if two[1:] == three[1:]:
        return False
    return True if (two[:2], three[:2]) == ((2, 2), (3, 3)) and two[2:] == three[2:] else None


def _put(whole, value: Tensor, name: str, tokens: bool, rows: Tensor, batch: int, length: int):
    """Puts a group's output among those of the batch."""
    if name not in whole:
        rest = (length, *value.shape[2:]) if tokens else tuple(value.shape[1:])
        whole[name] = value.new_zeros(batch, *rest)
    if tokens:
        whole[name][rows, : value.shape[1]] = value
    else:
        whole[name][rows] = value
