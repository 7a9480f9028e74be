"""A model on a CUDA device as recorded graphs, one for each bucket of shapes.

A small encoder at small batches is bound by launching its kernels, each some microseconds; a graph
launches them all at once. It has fixed shapes, so that a batch is filled up to the next bucket:
texts to a power of two, lengths to a multiple of 64 (of 16 up to 64). What was filled up is
padding to the mask and is cut off.

The graphs of a model share their memory and run one at a time: callers in threads wait for each
other to launch, callers on streams for each other's results to be taken out of that memory.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from .grouped import by_token

_WARMUPS = 3  # before a capture: libraries choose algorithms and allocate at their first calls


class Graphed(nn.Module):
    """A model whose forwards on a CUDA device are replayed.

    Args:
        model: takes `input_ids` and `attention_mask` [B, T], and `token_type_ids` if given, and
            gives a mapping of tensors [B, ..]; on a CUDA device. What gives something else besides,
            such as hidden states, runs unrecorded.
        most: buckets that are kept; of others the model itself runs, unrecorded.
        record: makes a replaying function of a function without arguments; for tests.
    """

    def __init__(self, model: nn.Module, most: int = 64, record: Callable | None = None):
        super().__init__()
        self.model = model
        self.most = most
        self._record = record or _Recorder()
        self._lock = threading.Lock()
        self._graphs: dict[tuple, _Graph | None] = {}  # None: it cannot be cut out of a bucket
        self._taken: torch.cuda.Event | None = None  # the last outputs are out of the memory

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
        return_dict: bool | None = None,
        **others: object,
    ):
        """As the model's own; with further arguments, or other shapes than [B, T] or [1, T], it is
        the model's."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        given = {**given, "token_type_ids": token_type_ids}
        given = {name: x for name, x in given.items() if x is not None}
        others = {name: x for name, x in others.items() if x is not None}
        if return_dict not in (None, self._setting("return_dict", True)):
            others["return_dict"] = return_dict
        if others or not _are_texts(given):
            return self.model(**given, **others)
        batch, length = input_ids.shape
        if attention_mask is None:
            given["attention_mask"] = torch.ones_like(input_ids)
        given = {name: x.expand(batch, length) for name, x in given.items()}
        shape = bucket(batch, length, self._setting("max_position_embeddings", None))
        with self._lock:
            key = (*shape, token_type_ids is not None)
            if key not in self._graphs and len(self._graphs) < self.most:
                self._graphs[key] = self._capture(given, shape)
            graph = self._graphs.get(key)
            if graph is not None:
                return self._replayed(graph, given)
        return self.model(**given)

    def _setting(self, name: str, default: object) -> object:
        return getattr(getattr(self.model, "config", None), name, default)

    def _capture(self, given: dict[str, Tensor], shape: tuple[int, int]) -> "_Graph | None":
        forms = by_token(lambda part: self.model(**part), given, *given["input_ids"].shape)
        if None in forms.values():
            return None
        buffers = {name: x.new_zeros(shape) for name, x in given.items()}
        self._fill(buffers, given)
        return _Graph(buffers, forms, self._record(lambda: self.model(**buffers)))

    def _replayed(self, graph: "_Graph", given: dict[str, Tensor]):
        batch, length = given["input_ids"].shape
        stream = _stream(graph.buffers["input_ids"].device)
        if self._taken is not None:
            stream.wait_event(self._taken)
        self._fill(graph.buffers, given)
        output = graph.replay()
        cut = {}
        for name, value in output.items():
            value = value[:batch, :length] if graph.forms[name] else value[:batch]
            cut[name] = value.clone()
        if stream is not None:
            self._taken = stream.record_event()
        return type(output)(**cut)

    def _fill(self, buffers: dict[str, Tensor], given: dict[str, Tensor]) -> None:
        # RoBERTa numbers the tokens that are none of padding, wherever the mask is 0.
        padding = self._setting("pad_token_id", None) or 0
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


class _Graph(NamedTuple):
    buffers: dict[str, Tensor]  # what it reads
    forms: dict[str, bool]  # of what it gives, by `by_token`
    replay: Callable


def _are_texts(given: dict[str, Tensor]) -> bool:
    ids = given.get("input_ids")
    if ids is None or ids.dim() != 2:
        return False
    fit = (tuple(ids.shape), (1, ids.shape[1]))
    return all(tuple(x.shape) in fit for x in given.values())


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class _Recorder:
    """Records forwards as CUDA graphs that share one pool of memory.

    Other threads may go on allocating and copying meanwhile ("thread_local"), but a process
    records one graph at a time, whatever its model.
    """

    _one = threading.Lock()

    def __init__(self):
        self._pool = None

    def __call__(self, forward: Callable) -> Callable:
        with self._one:
            return self._recorded(forward)

    def _recorded(self, forward: Callable) -> Callable:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUPS):
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = forward()
        self._pool = self._pool or graph.pool()

        def replay():
            graph.replay()
            return output

        return replay
