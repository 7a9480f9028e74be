"""What the Hugging Face Trainer needs to read a `TeacherCache`: a dataset, a collator, a sampler.

A dataset item is a sentence's number and nothing else; the collator fetches a whole batch from the
cache at once. Sentences of similar length meet in a batch, so that little of it is padding.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fastffn.distill.cache import TeacherCache


class SentenceNumbers(Dataset):
    """Numbers 0 .. count - 1; use it with `CacheCollator` and `remove_unused_columns=False`."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class CacheCollator:
    """Turns sentence numbers into `TeacherCache.batch`."""

    def __init__(self, cache: TeacherCache, outputs: Sequence[str] | None = None):
        self.cache, self.outputs = cache, outputs

    def __call__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return self.cache.batch(indices, self.outputs)


class LengthSampler(Sampler[int]):
    """A random order in which each run of `batch_size` sentences has similar lengths.

    Sentences are shuffled, sorted by length within pools of `pool` batches, and the pools' batches
    shuffled again. With `whole` an epoch leaves out, by chance, as many as do not fill a batch. The
    order is a function of (seed, epoch) alone: a resumed run, or another process, sees the same
    one. Why not the Trainer's `group_by_length`: it draws from the global generator, and from the
    second epoch on a resumed run takes another path.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        seed: int = 0,
        pool: int = 50,
        whole: bool = False,
    ):
        self.lengths = np.asarray(lengths)
        self.batch_size, self.seed, self.pool = batch_size, seed, pool
        self.epoch = 0
        self.count = len(self.lengths)
        if whole and self.count > batch_size:
            self.count -= self.count % batch_size

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.lengths))[: self.count]
        size = self.batch_size * self.pool
        pools = [order[k : k + size] for k in range(0, len(order), size)]
        order = np.concatenate([p[np.argsort(self.lengths[p], kind="stable")] for p in pools])
        whole = len(order) // self.batch_size * self.batch_size
        batches = order[:whole].reshape(-1, self.batch_size)
        batches = batches[generator.permutation(len(batches))]
        yield from batches.ravel().tolist()
        yield from order[whole:].tolist()  # the incomplete batch stays last
