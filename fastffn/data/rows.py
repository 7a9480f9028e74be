"""Rows of unequal length in flat arrays: how a tokenizer's lists become them, where rows lie."""

from collections.abc import Iterable, Mapping

import numpy as np


def flat_rows(
    chunks: Iterable[Mapping[str, list[list[int]]]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Rows of a tokenizer's batches, one after another.

    Args:
        chunks: batches with input_ids and, if the tokenizer makes them, token_type_ids.

    Returns:
        tokens: int32 [tokens]; offsets: int64 [rows + 1], where each row begins, and the end;
        types: int8 [tokens] or None.
    """
    tokens, types, lengths = [np.zeros(0, np.int32)], [], [np.zeros(1, np.int64)]
    for chunk in chunks:
        rows = chunk["input_ids"]
        lengths.append(np.fromiter(map(len, rows), np.int64, len(rows)))
        tokens.append(flat(rows, np.int32))
        if "token_type_ids" in chunk:
            types.append(flat(chunk["token_type_ids"], np.int8))
    return (
        np.concatenate(tokens),
        np.cumsum(np.concatenate(lengths)),
        np.concatenate(types) if types else None,
    )


def flat(rows: list[list[int]], dtype: type) -> np.ndarray:
    """The numbers of all rows in one array."""
    return np.fromiter((value for row in rows for value in row), dtype, sum(map(len, rows)))


def places(offsets: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the tokens of some rows go in a padded array, and where they come from.

    Returns:
        real: bool [numbers, longest], true where there is a token.
        flat: int64 [tokens of these rows], their places in the flat arrays, in the order of `real`.
    """
    starts, lengths = offsets[numbers], offsets[numbers + 1] - offsets[numbers]
    columns = np.arange(lengths.max(initial=0))
    real = columns < lengths[:, None]
    return real, (starts[:, None] + columns)[real]
