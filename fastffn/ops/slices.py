"""Gradients of leading slices of a larger weight, as a supernet's genes use them.

torch's own slices give each gradient the size of the whole weight, filled up with zeros, which are
then added to the sum so far: for a narrow gene most of the work is adding zeros.
"""

import torch
from torch import Tensor


def padded(gradient: Tensor | None, operand: Tensor | None) -> Tensor | None:
    """The gradient of the leading part of `operand` as one of the whole, with zeros."""
    if gradient is None or gradient.shape == operand.shape:
        return gradient
    whole = operand.new_zeros(operand.shape)
    whole[_leading(gradient)] = gradient
    return whole


def accumulated(gradient: Tensor | None, operand: Tensor | None) -> Tensor | None:
    """What a backward returns for `operand`, of which it used the leading part.

    Where that is certain to be all that would happen, the gradient is added to the leading part of
    `operand.grad` here, and None is returned: no zeros are written or added. (Hooks that run before
    the accumulation, on its node of the graph, then see None.)
    """
    if gradient is None or not operand.requires_grad:
        return None
    if gradient.shape == operand.shape:
        return gradient
    accumulates = operand.is_leaf and _accumulates(operand)
    if accumulates is False:
        return None
    if accumulates and _by_addition_alone(operand):
        operand.grad[_leading(gradient)] += gradient
        return None
    return padded(gradient, operand)


def _leading(gradient: Tensor) -> tuple[slice, ...]:
    return tuple(slice(size) for size in gradient.shape)


def _accumulates(leaf: Tensor) -> bool | None:
    """Whether this backward adds to the leaf's `.grad`; None if torch.autograd.grad asks for the
    gradient itself."""
    node = torch.autograd.graph.get_gradient_edge(leaf).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return None


def _by_addition_alone(leaf: Tensor) -> bool:
    """Whether nothing looks at the gradient on its way into `.grad`, as far as can be seen.

    Not in distributed training, whose hooks on the accumulation cannot be seen from here.
    """
    if leaf.grad is None or leaf.grad.layout is not torch.strided or leaf.grad.dtype != leaf.dtype:
        return False
    if leaf._backward_hooks or getattr(leaf, "_post_accumulate_grad_hooks", None):
        return False
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())
