"""Question answering by windows: contexts are longer than models, answers are read across windows.

A row of tokens is a question and as much of its context as there is room for; the next row of the
same question begins 128 tokens (or half the room, where that is less) before this one's end, so
that an answer cut by one window is whole in the next. Training asks each window for the answer's
first and last token, and for (0, 0), the classification token, where the answer is not in it.

Why overlaps are half the room at most: with short rows an overlap of 128 would leave no progress.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastffn.data.qa import QaExamples
from fastffn.data.rows import flat_rows, places
from fastffn.errors import UserError

_CHUNK = 500  # questions a call of the tokenizer
_OVERLAP = 128
_LONGEST_QUESTION = 64  # tokens
_LONGEST_ANSWER = 30  # tokens


@dataclass(frozen=True)
class Windows:
    """Where the tokens of each row lie in its context.

    Attributes:
        example: number of each row's question, int64 [rows].
        offsets: int64 [rows + 1], as `Encoded` has them.
        starts, ends: characters of each token in the context, int32 [tokens]; -1 outside of it.
    """

    example: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def qa_windows(
    tokenizer, examples: QaExamples, max_length: int
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray, Windows]:
    """Tokenises questions with their contexts.

    Returns:
        tokens, offsets and types as `flat_rows`; the first answer's first and last token in each
        row, int64 [rows, 2]; the windows.

    Raises:
        UserError: a tokenizer that does not know the characters of its tokens.
    """
    if not tokenizer.is_fast:
        raise UserError(
            "question answering needs a fast tokenizer: put tokenizer.json beside the model"
        )
    special = tokenizer.num_special_tokens_to_add(pair=True)
    longest = min(_LONGEST_QUESTION, (max_length - special) // 2)
    room = max_length - special - longest
    where: list[list[np.ndarray]] = [[], [], [], []]  # example, starts, ends, labels

    def chunks() -> Iterator[dict]:
        for start in range(0, len(examples), _CHUNK):
            part = slice(start, start + _CHUNK)
            batch = tokenizer(
                _cut(tokenizer, examples.questions[part], longest),
                examples.contexts[part],
                truncation="only_second",
                max_length=max_length,
                stride=min(_OVERLAP, room // 2),
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_attention_mask=False,
            )
            for row, number in enumerate(batch["overflow_to_sample_mapping"]):
                characters = np.array(batch["offset_mapping"][row], np.int32)
                outside = np.array([side != 1 for side in batch.sequence_ids(row)])
                characters[outside] = -1
                number += start
                answer = _tokens_of_answer(characters, examples, number)
                for values, value in zip(where, (number, *characters.T, answer), strict=True):
                    values.append(value)
            yield batch

    rows = flat_rows(chunks())
    windows = Windows(
        np.array(where[0], np.int64),
        rows[1],
        np.concatenate([np.zeros(0, np.int32), *where[1]]),
        np.concatenate([np.zeros(0, np.int32), *where[2]]),
    )
    return rows, np.array(where[3], np.int64).reshape(-1, 2), windows


def _cut(tokenizer, questions: list[str], longest: int) -> list[str]:
    """Questions without what exceeds `longest` tokens."""
    batch = tokenizer(
        questions,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    return [
        question if len(characters) <= longest else question[: characters[longest - 1][1]]
        for question, characters in zip(questions, batch["offset_mapping"], strict=True)
    ]


def _tokens_of_answer(characters: np.ndarray, examples: QaExamples, number: int) -> tuple[int, int]:
    """First and last token of a question's first answer; (0, 0) where it is not all there."""
    if not examples.texts[number]:
        return 0, 0
    text = examples.texts[number][0]
    start = examples.starts[number][0] + len(text) - len(text.lstrip())
    end = start + len(text.strip())
    inside = np.flatnonzero(characters[:, 1] >= 0)
    if not len(inside) or start < characters[inside[0], 0] or end > characters[inside[-1], 1]:
        return 0, 0
    first = inside[np.argmax(characters[inside, 1] > start)]
    last = inside[np.flatnonzero(characters[inside, 0] < end)[-1]]
    return (int(first), int(last)) if first <= last else (0, 0)


@dataclass
class SpanReader:
    """Collects the best span of each window, batch by batch, and chooses among a question's.

    Attributes:
        windows: of all rows.
        best: score of each row's best span, float64 [rows].
        none: score of no answer, float64 [rows].
        spans: characters of that span, int64 [rows, 2].
    """

    windows: Windows

    def __post_init__(self):
        count = len(self.windows.example)
        self.best = np.full(count, -np.inf)
        self.none = np.full(count, -np.inf)
        self.spans = np.zeros((count, 2), np.int64)

    def read(self, numbers: np.ndarray, start: np.ndarray, end: np.ndarray) -> None:
        """Takes the logits of some rows, [numbers, length] each, of length at least theirs."""
        real, flat = places(self.windows.offsets, numbers)
        length = real.shape[1]
        starts, ends = (np.full(real.shape, -1, np.int64) for _ in range(2))
        starts[real], ends[real] = self.windows.starts[flat], self.windows.ends[flat]
        self.none[numbers] = start[:, 0].astype(np.float64) + end[:, 0]
        outside = starts < 0
        start = np.where(outside, -np.inf, start[:, :length])
        end = np.where(outside, -np.inf, end[:, :length])
        rows = np.arange(len(numbers))
        best = np.full(len(numbers), -np.inf)
        for longer in range(min(_LONGEST_ANSWER, length)):
            scores = start[:, : length - longer] + end[:, longer:]
            first = scores.argmax(axis=1)
            better = scores[rows, first] > best
            best[better] = scores[rows, first][better]
            chosen = numbers[better]
            self.spans[chosen, 0] = starts[rows, first][better]
            self.spans[chosen, 1] = ends[rows, first + longer][better]
        self.best[numbers] = best

    def answers(self, examples: QaExamples) -> list[str]:
        """The best span over each question's windows, as text.

        It is "" where no answer scores higher in every window, if the questions have such among
        them (SQuAD 2.0, without tuning of a threshold).
        """
        may_be_none = not all(examples.texts)
        none = np.full(len(examples), np.inf)
        np.minimum.at(none, self.windows.example, self.none)
        best = np.full(len(examples), -np.inf)
        row_of = np.zeros(len(examples), np.int64)
        for row in np.argsort(self.best, kind="stable"):
            best[self.windows.example[row]] = self.best[row]
            row_of[self.windows.example[row]] = row
        texts = []
        for number, context in enumerate(examples.contexts):
            start, end = self.spans[row_of[number]]
            answered = np.isfinite(best[number])
            if not answered or (may_be_none and none[number] > best[number]):
                texts.append("")
            else:
                texts.append(context[start:end])
        return texts
