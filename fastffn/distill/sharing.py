"""What the sub-networks of a supernet's step have in common is computed once.

    read_each(supernet, networks, batch, names)     what `reading.read` gives, for each sub-network

All start from the same embeddings and the same first attention, and their first FFNs from the same
product, of which each takes leading columns (`ElasticFFN.forward_many`). One graph holds it all, so
the backward runs through the common part once as well, with the sum of the gradients: those of the
separate computation, up to rounding. Dropout there has one mask for the whole step; behind the
first product each sub-network has masks of its own.

Not shared: a first layer under gradient checkpointing, which would be computed again for each; one
with hooks on its FFN, which would see the sub-networks together; and where one sub-network leaves
the first layer out.

Why not the sub-networks as one batch through the attentions above, too: it saves no product, and on
a CPU no time (of four, forward and backward: nothing at 1,024 tokens of 384, 4 % at 256 of 540).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from fastffn.distill.reading import read
from fastffn.distill.subnetworks import SubNetwork
from fastffn.expr import Gene
from fastffn.models.architectures import Encoder

# What is read of the embeddings and the first attention.
_COMMON = ("embeddings", "q.0", "k.0", "v.0", "scores.0")


def read_each(
    supernet: nn.Module,
    networks: Sequence[SubNetwork],
    batch: dict[str, Tensor],
    names: Sequence[str],
) -> list[dict[str, object]]:
    """Runs sub-networks on a batch, one after the other; the last stays set.

    Args:
        supernet: an EfficientBert with elastic FFNs, with or without a head.
        networks: at least one.
        batch, names: as `reading.read` takes them.

    Returns:
        For each sub-network name -> tensor, without names of layers that do not run; what is common
        to all is the same tensor.

    Raises:
        UserError: as `reading.read` and `set_genes`.
    """
    base = Encoder(supernet).base
    common: dict[str, object] = {}
    found = []
    with contextlib.ExitStack() as stack:
        shares = _may_share(base, networks)
        if shares:
            stack.enter_context(_shared(base, [network.genes[0] for network in networks]))
        for genes, layers in networks:
            supernet.set_genes(genes, layers)
            wanted = [name for name in names if name not in common and _runs(name, layers)]
            ours = common | read(supernet, batch, wanted)
            if shares:
                common = {name: ours[name] for name in _COMMON if name in ours}
            found.append(ours)
    return found


def _runs(name: str, layers: Sequence[int] | None) -> bool:
    """Whether what is read belongs to one of the layers; embeddings are what the first gets."""
    layer = "0" if name == "embeddings" else name.partition(".")[2]
    return layers is None or not layer or int(layer) in layers


def _may_share(base: nn.Module, networks: Sequence[SubNetwork]) -> bool:
    first = base.encoder.layer[0]
    if first.gradient_checkpointing and first.training:
        return False
    if first.ffn._forward_hooks or first.ffn._forward_pre_hooks:
        return False
    return all(network.layers is None or network.layers[0] == 0 for network in networks)


@contextlib.contextmanager
def _shared(base: nn.Module, genes: Sequence[Gene]) -> Iterator[None]:
    """Within the block the n-th forward is that of genes[n] in the first layer."""
    layer, embeddings = base.encoder.layer[0], base.embeddings
    embedded: list[Tensor] = []
    waiting: list[Tensor] = []

    def embed(*args: object, **kwargs: object) -> Tensor:
        if not embedded:
            embedded.append(type(embeddings).forward(embeddings, *args, **kwargs))
        return embedded[0]

    def run(states: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> Tensor:
        if not waiting:
            states, _ = layer.attention(states, attention_mask, **kwargs)
            waiting.extend(layer.ffn.forward_many(states, genes))
        return waiting.pop(0)

    with _replaced(embeddings, embed), _replaced(layer, run):
        yield


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Within the block the module's forward, with its hooks around it, is another."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
