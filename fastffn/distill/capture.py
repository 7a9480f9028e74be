"""Reads queries, keys, values and hidden states out of an encoder by forward hooks.

    with capture(model, layer=-1) as states:
        model(**batch)
    states["q"]                        # [batch, length, width], still part of the autograd graph

Hooks sit on the projections themselves, so any attention implementation works (eager, SDPA, flash:
fused ones never show their maps) and a student trains through what was captured. Why not
`output_attentions`: it forces the eager implementation, gives maps rather than the vectors that
relations need, and does so for every layer.

What counts is a call of a projection from within a call of its layer, the first one: DeBERTa-v2
calls its projections once more for the relative positions, and gradient checkpointing computes a
layer once more in the backward. The last forward of a layer counts.

Activations are read as [batch, length, width]. ModernBERT under flash attention once unpadded its
batch before the first layer; transformers 5.23 does so inside the attention, behind the
projections. Activations of another rank are refused. Texts that the caller packs into one row are
captured as that row.

`architectures.py` says which encoders are known.
"""

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastffn.errors import UserError
from fastffn.models.architectures import Encoder

_RELATED = ("q", "k", "v")
_OF_ATTENTION = (*_RELATED, "scores")
_NAMES = (*_OF_ATTENTION, "hidden", "embeddings")


class Scores(NamedTuple):
    """What attention scores are made of: q k^T / sqrt(width / num_heads), head by head.

    `fastffn.functional.score_mse` takes the three; the map of length x length is never made.
    """

    q: Tensor  # [batch, length, width], as the scores' product sees it: after rotary embedding
    k: Tensor
    num_heads: int


class States(dict):
    """What was captured, by name; asking for more is told apart from asking too early."""

    def __missing__(self, name):
        raise UserError(
            f"{name!r} was not captured: name it in what= and run the model in the block, before "
            "it is read"
        )


@contextlib.contextmanager
def capture(
    model: nn.Module,
    layer: int | Sequence[int] = -1,
    what: str | Sequence[str] = ("q", "k", "v", "hidden"),
    *,
    rotary: str = "after",
    stop: bool = False,
) -> Iterator[dict]:
    """Collects tensors of one or more layers during the forwards inside the block.

    The last forward counts. Tensors are not detached. When the block ends, also by an exception,
    the model is as it was. Captures of several models nest, and so do captures of one.

    Args:
        model: a Hugging Face encoder that `fastffn.models.architectures` knows (BERT, RoBERTa,
            XLM-R, DistilBERT, ELECTRA, MPNet, DeBERTa-v2, ModernBERT and some more), one of
            fastffn's, or a class of one's own that has BERT's modules under BERT's names; with
            any head; as it is or in DistributedDataParallel. DataParallel over several devices is
            refused. A model compiled as a whole by torch.compile works, and stays compiled, as
            long as it is called inside such blocks only: compiled code does not see hooks that
            come later, so after a call outside, or compiled layer by layer, nothing is captured,
            which the block's end reports.
        layer: index of a layer from 0, negative from the end, or a sequence of such.
        what: names out of
            "q", "k", "v"   projections of the layer's input [batch, length, width], heads side by
                            side, before the split into heads
            "hidden"        [batch, length, width], what the next layer gets. The last layer's is
                            the model's last hidden state, except where a final norm follows the
                            layers (ModernBERT, Megatron-BERT): it is taken before that norm
            "scores"        `Scores`: q, k and the number of heads, for `score_mse`. Refused where
                            attention scores are not q k^T alone (DeBERTa-v2, MPNet, classes of
                            one's own) or are not all used (decoders, ModernBERT's local layers)
            "embeddings"    [batch, length, width], what the first layer gets (ELECTRA's after its
                            projection); hidden state 0 of transformers
        rotary: "after" or "before": where q and k are taken if the attention rotates them by
            position (ModernBERT). After is what attention compares, and holds the word order as
            the q and k of a BERT do, whose inputs contain positions. Rotation pairs a head's
            halves: relation heads that are narrower than the model's heads part the pairs, and
            then the content alone, "before", may be the clearer target. Values are never rotated,
            "scores" always are, and without rotary embedding both options mean the same.
        stop: run no layer above the last one that is read; it is run to its end. Meant for
            teachers. What the model returns is then computed from that layer's output as if it
            were the last: logits and sentence vectors mean little, and hidden states above it are
            missing.

    Yields:
        A dict that each forward fills. For one layer: name -> tensor. For a sequence:
        number of the layer, not negative -> such a dict, and "embeddings" -> tensor beside them.

    Raises:
        UserError: an unknown structure, layer, name or option; scores that are not q k^T; layers
            that an outer block has stopped; in the forward, reentrant gradient checkpointing,
            whose layers run without a graph. At the end of the block: something was not captured,
            because no forward passed there.
    """
    encoder = Encoder(model)
    numbers = _numbers(layer, len(encoder.layers))
    names = (what,) if isinstance(what, str) else tuple(what)
    _check(encoder, numbers, names, rotary)
    of_layers = [name for name in names if name != "embeddings"]
    last = max(numbers) if of_layers and numbers else 0
    if last >= encoder.running():
        raise UserError(
            f"layer {last} does not run: a capture around this one stops after layer "
            f"{encoder.running() - 1}; open this one outside of it"
        )
    by_layer = {number: States() for number in numbers}
    single = by_layer[numbers[0]] if _is_number(layer) else None
    states = States(by_layer) if single is None else single
    with contextlib.ExitStack() as stack:
        for number in numbers if of_layers else ():
            tap = _Tap(encoder, number, of_layers, rotary == "before", by_layer[number])
            tap.install(stack)
        if "embeddings" in names:
            _tap_embeddings(encoder, states, stack)
        if stop:
            run = min(last + 1, encoder.running())
            stack.enter_context(encoder.walking(list(encoder.layers)[:run]))
        yield states
    missing = {
        f"layer {number}": [name for name in of_layers if name not in by_layer[number]]
        for number in numbers
    }
    if "embeddings" in names and "embeddings" not in states:
        missing["layer 0"] = ["embeddings", *missing.get("layer 0", ())]
    for place, lost in missing.items():
        if lost:
            raise UserError(
                f"no {sorted(lost)} passed {place}: run the model in the block{_compiled(model)}"
            )


class _Tap:
    """The hooks of one layer. `states` is the reader's dict."""

    def __init__(
        self, encoder: Encoder, number: int, names: Sequence[str], before: bool, states: States
    ):
        self.layer = encoder.layers[number]
        self.attention = encoder.attention(number)
        self.sources = encoder.projections(number)
        self.output = encoder.output(number)
        self.names, self.states = names, states
        self.rotates = encoder.architecture.rotary
        self.before = before
        self.num_heads = encoder.base.config.num_attention_heads if "scores" in names else 0
        # Within a call of the layer. Its insides run once more under gradient checkpointing, and
        # what they make then must not be kept alive.
        self.open = False
        self.graph = False
        self.found: dict[str, Tensor] = {}
        self.positions: tuple[Tensor, Tensor] | None = None

    def install(self, stack: contextlib.ExitStack) -> None:
        """Registers the hooks and their removal."""

        def add(handle):
            stack.callback(handle.remove)

        add(self.layer.register_forward_pre_hook(self._enter))
        if any(name in _OF_ATTENTION for name in self.names):
            keys = _RELATED if len(self.sources) == 3 else ("qkv",)
            for name, module in zip(keys, self.sources, strict=True):
                add(module.register_forward_hook(self._projected(name)))
        if self.rotates:
            add(self.attention.register_forward_pre_hook(self._attending, with_kwargs=True))
        add(self.layer.register_forward_hook(self._leave))
        if "hidden" in self.names:
            add(self.output.register_forward_hook(self._hidden))

    def _enter(self, module, args):
        if getattr(module, "_is_replica", False):
            raise UserError(
                "DataParallel splits the batch over devices, and each part would overwrite the "
                "others' captures: use DistributedDataParallel, or call model.module"
            )
        self.open, self.graph = True, torch.is_grad_enabled()
        self.found = {}
        for name in self.names:
            self.states.pop(name, None)

    def _attending(self, module, args, kwargs):
        if self.open:
            self.positions = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)

    def _projected(self, name):
        def hook(module, args, output):
            if not self.open or name in self.found:
                return
            if self.graph and not torch.is_grad_enabled():
                raise UserError(
                    "gradient checkpointing with use_reentrant=True runs layers without a graph, "
                    "so no gradient would flow through what is captured: use use_reentrant=False"
                )
            self.found[name] = _checked(output)

        return hook

    def _leave(self, module, args, output):
        # Here and not inside the attention: what is computed there is part of a checkpoint, which
        # would not find it when it computes the layer again.
        self.open, found, self.found = False, self.found, {}
        if not found or len(found) < len(self.sources):
            return  # compiled code may call some hooks and not the others
        parts = found["qkv"].chunk(3, dim=-1) if "qkv" in found else [found[n] for n in _RELATED]
        read = dict(zip(_RELATED, parts, strict=True))
        turned = parts[:2]
        if self.rotates and ("scores" in self.names or not self.before):
            turned = [_rotated(x, self.positions) for x in turned]
        if not self.before:
            read["q"], read["k"] = turned
        if self.num_heads:
            read["scores"] = Scores(*turned, self.num_heads)
        for name in self.names:
            if name in read:
                self.states[name] = read[name]

    def _hidden(self, module, args, output):
        self.states["hidden"] = _checked(output[0] if isinstance(output, tuple) else output)


def _tap_embeddings(encoder: Encoder, states: States, stack: contextlib.ExitStack) -> None:
    def hook(module, args, kwargs):
        states["embeddings"] = _checked(args[0] if args else kwargs["hidden_states"])

    handle = encoder.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    stack.callback(handle.remove)


def _rotated(x: Tensor, positions: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotary position embedding (RoFormer, 2104.09864), a head's halves paired; in float32.

    transformers does the same inside the attention, where no hook reaches it. x is
    [batch, length, width]; positions are (cos, sin), each [batch or 1, length, head width].
    """
    if positions is None:
        raise UserError(
            "the attention was not handed position_embeddings, so its rotary embedding is unknown: "
            'use rotary="before", without "scores"'
        )
    cos, sin = (part.unsqueeze(-2) for part in positions)
    heads = x.unflatten(-1, (-1, cos.shape[-1])).float()
    first, second = heads.chunk(2, dim=-1)
    turned = heads * cos + torch.cat((-second, first), dim=-1) * sin
    return turned.flatten(-2).to(x.dtype)


def _checked(tensor: Tensor) -> Tensor:
    if tensor.dim() != 3:
        raise UserError(
            f"the model holds its activations as {list(tensor.shape)} and not as [batch, length, "
            'width], without its padding perhaps: load it with attn_implementation="sdpa"'
        )
    return tensor


def _is_number(layer: object) -> bool:
    return not isinstance(layer, bool) and hasattr(layer, "__index__")


def _numbers(layer: int | Sequence[int], count: int) -> list[int]:
    """Layers counted from 0, each once, in the order of their naming."""
    wanted = [layer] if _is_number(layer) else layer
    if isinstance(wanted, str) or not hasattr(wanted, "__iter__"):
        raise UserError(f"layer {layer!r} is neither a number nor a sequence of numbers")
    numbers = []
    for number in wanted:
        if not _is_number(number) or not -count <= operator.index(number) < count:
            raise UserError(f"layer {number} does not exist: the encoder has {count} layers")
        numbers.append(operator.index(number) % count)
    return list(dict.fromkeys(numbers))


def _check(encoder: Encoder, numbers: list[int], names: tuple[str, ...], rotary: str) -> None:
    if unknown := sorted(set(names) - set(_NAMES)):
        raise UserError(f"cannot capture {unknown}: choose among {list(_NAMES)}")
    if rotary not in ("before", "after"):
        raise UserError(f"rotary {rotary!r} is unknown: choose before or after")
    if not numbers and set(names) != {"embeddings"}:
        raise UserError('no layer to capture: name one, or what="embeddings" alone')
    for number in numbers if "scores" in names else ():
        if why := encoder.why_no_scores(number):
            raise UserError(
                f"the attention scores of {type(encoder.base).__name__} cannot be captured: "
                f'{why}; capture "q" and "k", whose relations can be taught'
            )


def _compiled(model: nn.Module) -> str:
    for module in model.modules():
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            return "; a compiled model must be compiled whole, and called in such blocks only"
    return ""
