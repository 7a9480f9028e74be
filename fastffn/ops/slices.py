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
    whole = torch.zeros_like(operand)
    whole[_leading(gradient)] = gradient
    return whole


def accumulated(gradient: Tensor | None, operand: Tensor | None) -> Tensor | None:
    """What a backward returns for `operand`, of which it used the leading part.

    Where that is certain to be all that would happen, the gradient is added to the leading part of
    `operand.grad` here, and None is returned: no zeros are written or added.
    """
    if gradient is None or gradient.shape == operand.shape:
        return gradient
    if not _only_accumulates(operand):
        return padded(gradient, operand)
    operand.grad[_leading(gradient)] += gradient
    return None


def _leading(gradient: Tensor) -> tuple[slice, ...]:
    return tuple(slice(size) for size in gradient.shape)


def _only_accumulates(operand: Tensor) -> bool:
    """Whether this backward does nothing with the operand's gradient but add it to `.grad`.

    Not if hooks look at the gradient, not in torch.autograd.grad, and not in distributed training,
    whose hooks on the accumulation cannot be seen from here.
    """
    if not operand.is_leaf or operand.grad is None:
        return False
    if operand.grad.layout is not torch.strided or operand.grad.dtype != operand.dtype:
        return False
    if operand._backward_hooks or getattr(operand, "_post_accumulate_grad_hooks", None):
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    node = torch.autograd.graph.get_gradient_edge(operand).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad asks for this operand's gradient
        return False
