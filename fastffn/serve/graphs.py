"""A model on a CUDA device as recorded graphs, one for each bucket of shapes.

A small encoder at small batches is bound by launching its kernels, each some microseconds; a graph
launches them all at once. It has fixed shapes, so that a batch is filled up to the next bucket:
texts to a power of two, lengths to a multiple of 64 (of 16 up to 64). What was filled up is
padding to the mask and is cut off.

The graphs of a model share their memory and run one at a time; callers wait for each other.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import UserError
from .grouped import is_by_token

_WARMUPS = 3  # before a capture: libraries choose algorithms and allocate at their first calls


class Graphed(nn.Module):
    """A model whose forwards on a CUDA device are replayed.

    Args:
        model: takes `input_ids` and `attention_mask` [B, T], and `token_type_ids` if given, and
            gives a mapping of tensors [B, ..]; on a CUDA device.
        most: buckets that are kept; of others the model itself runs, unrecorded.
        record: makes a replaying function of a function without arguments; for tests.
    """

    def __init__(self, model: nn.Module, most: int = 64, record: Callable | None = None):
        super().__init__()
        self.model = model
        self.most = most
        self._record = record or _Recorder()
        self._lock = threading.Lock()
        self._graphs: dict[tuple, tuple[dict[str, Tensor], Callable]] = {}

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **others: object,
    ):
        """As the model's own; with further arguments, or without token ids, it is the model's."""
        if input_ids is None or any(value is not None for value in others.values()):
            return self.model(
                input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, **others
            )
        batch, length = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            given["token_type_ids"] = token_type_ids
        shape = bucket(batch, length, getattr(self.model.config, "max_position_embeddings", None))
        with self._lock:
            key = (*shape, token_type_ids is not None)
            if key not in self._graphs and len(self._graphs) >= self.most:
                return self.model(**given)
            if key not in self._graphs:
                self._graphs[key] = self._capture(given, shape)
            buffers, replay = self._graphs[key]
            self._fill(buffers, given)
            output = replay()
            return type(output)(
                **{
                    name: _cut(name, value, shape, batch, length).clone()
                    for name, value in output.items()
                    if torch.is_tensor(value)
                }
            )

    def _capture(self, given: dict[str, Tensor], shape: tuple[int, int]):
        buffers = {name: x.new_zeros(shape) for name, x in given.items()}
        self._fill(buffers, given)
        return buffers, self._record(lambda: self.model(**buffers))

    def _fill(self, buffers: dict[str, Tensor], given: dict[str, Tensor]) -> None:
        # RoBERTa numbers the tokens that are none of padding, wherever the mask is 0.
        padding = getattr(self.model.config, "pad_token_id", None) or 0
        for name, x in given.items():
            buffer = buffers[name].fill_(padding if name == "input_ids" else 0)
            buffer[: x.shape[0], : x.shape[1]].copy_(x)
        # A text without tokens has nothing to attend to: filled-up texts have one.
        buffers["attention_mask"][given["attention_mask"].shape[0] :, 0] = 1


def bucket(batch: int, length: int, longest: int | None = None) -> tuple[int, int]:
    """The shape that a batch is filled up to; no longer than the model's positions.

    Raises:
        UserError: no text, or texts longer than the positions.
    """
    if batch < 1 or length < 1:
        raise UserError(f"input_ids: [{batch}, {length}]; give at least one text of one token")
    if longest is not None and length > longest:
        raise UserError(
            f"input_ids: {length} tokens, the model has {longest} positions; truncate the text"
        )
    step = 16 if length <= 64 else 64
    filled = (length + step - 1) // step * step
    return 1 << (batch - 1).bit_length(), filled if longest is None else min(filled, longest)


def _cut(name: str, x: Tensor, shape: tuple[int, int], batch: int, length: int) -> Tensor:
    x = x[:batch] if x.dim() and x.shape[0] == shape[0] else x
    return x[:, :length] if is_by_token(name, x, shape[1]) else x


class _Recorder:
    """Records forwards as CUDA graphs that share one pool of memory."""

    def __init__(self):
        self._pool = None

    def __call__(self, forward: Callable) -> Callable:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUPS):
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = forward()
        self._pool = self._pool or graph.pool()

        def replay():
            graph.replay()
            return output

        return replay
