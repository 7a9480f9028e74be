"""What the processes of test_distributed run; a module that they can import."""

from pathlib import Path

import torch
import torch._dynamo  # before there is a process group, which it would keep (distill/processes.py)
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from fastffn import ElasticFFN
from fastffn.distill.processes import leave

GENES = ("1x1 tanh(down(gelu(up(x))))", "1x1/2 down(relu(mul(up(x), x)))")
_THREADS = ("gloo", "tcpstore")  # in the names of a process group's threads


def train(rank: int, world: int, inputs: torch.Tensor, folder: Path) -> None:
    """Two accumulated steps on this rank's share of `inputs`; rank 0 saves the gradients in
    `folder`/gradients.pt."""
    if world > 1:
        torch.set_num_threads(1)
        meeting = f"file://{folder}/store"  # a port may be taken between its choice and its use
        distributed.init_process_group("gloo", meeting, rank=rank, world_size=world)
    _step(rank, world, inputs, folder)
    if world > 1:
        distributed.barrier()
        leave()
        assert not group_threads()


def _step(rank: int, world: int, inputs: torch.Tensor, folder: Path) -> None:
    torch.manual_seed(0)
    block = ElasticFFN(24, 1, 24, dropout=0.0).double()
    model = DistributedDataParallel(block) if world > 1 else block
    for gene in GENES:  # the second is narrow: its gradient is added to the first one's
        model(inputs[rank::world], gene).square().mul(inputs[rank::world]).mean().backward()
    if rank == 0:
        torch.save([p.grad for p in block.parameters()], folder / "gradients.pt")


def group_threads() -> list[str]:
    """Names of this process's threads that belong to a process group; none outside Linux."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if any(word in name for word in _THREADS)]
