"""Extractive question answering, in SQuAD's format: examples and how they are read.

A question with its context has answers that are spans of the context, or none where it cannot be
answered (SQuAD 2.0). Texts and character positions are kept; windows of tokens are made by
`fastffn.data.windows`.
"""

import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastffn.data.text import read_utf8
from fastffn.errors import UserError

_HELD_OUT = 0.2  # of the articles, where one file has to serve for training and validation


@dataclass(frozen=True)
class QaExamples:
    """Questions; lists of equal length.

    Attributes:
        questions, contexts, ids: text.
        starts: for each question the first characters of its answers in the context.
        texts: for each question the texts of its answers; empty where it cannot be answered.
    """

    questions: list[str]
    contexts: list[str]
    ids: list[str]
    starts: list[list[int]]
    texts: list[list[str]]

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, numbers: Sequence[int]) -> "QaExamples":
        """The examples of these numbers, in this order."""
        lists = (self.questions, self.contexts, self.ids, self.starts, self.texts)
        return QaExamples(*([values[k] for k in numbers] for values in lists))


def read_squad(files: Sequence[tuple[Path, str]]) -> QaExamples:
    """Reads SQuAD json files.

    Args:
        files: paths, each with "all", or "train" or "validation" for that share of its articles:
            a fifth of them, by the hashes of their titles, is validation.

    Raises:
        UserError: a file that is missing, unreadable or not in SQuAD's format, or an answer that
            is not at its place in the context.
    """
    examples = QaExamples([], [], [], [], [])
    for path, share in files:
        text = read_utf8(path, "SQuAD file")
        try:
            for article in _share(json.loads(text)["data"], share):
                _add_article(examples, article)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not in SQuAD's format: {error!r}") from None
    return examples


def squad_examples(columns: Mapping[str, list]) -> QaExamples:
    """Examples from the hub's columns id, question, context and answers.

    Raises:
        UserError: an answer that is not at its place in the context, or no answers at all.
    """
    examples = QaExamples([], [], [], [], [])
    names = ("question", "context", "id", "answers")
    for question, context, key, answers in zip(*(columns[name] for name in names), strict=True):
        _add(examples, question, context, key, answers["answer_start"], answers["text"])
    return examples


def _add_article(examples: QaExamples, article: Mapping) -> None:
    for paragraph in article["paragraphs"]:
        for question in paragraph["qas"]:
            answers = [] if question.get("is_impossible") else question["answers"]
            _add(
                examples,
                question["question"],
                paragraph["context"],
                question["id"],
                [answer["answer_start"] for answer in answers],
                [answer["text"] for answer in answers],
            )


def _add(
    examples: QaExamples,
    question: str,
    context: str,
    key: object,
    starts: Sequence[int],
    texts: Sequence[str],
) -> None:
    for start, text in zip(starts, texts, strict=True):
        if context[start : start + len(text)] != text or not text.strip():
            raise UserError(
                f"question {key}: its answer {text!r} is not at character {start} of the context"
            )
    examples.questions.append(question)
    examples.contexts.append(context)
    examples.ids.append(str(key))
    examples.starts.append(list(starts))
    examples.texts.append(list(texts))


def _share(articles: list[dict], share: str) -> list[dict]:
    if share == "all":
        return articles
    order = sorted(
        range(len(articles)),
        key=lambda k: hashlib.sha256(str(articles[k].get("title", k)).encode()).digest(),
    )
    held = set(order[: round(_HELD_OUT * len(articles))])
    return [articles[k] for k in range(len(articles)) if (k in held) == (share == "validation")]


# -- scores ------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """As SQuAD compares answers: lower case, without punctuation, articles and spare spaces."""
    text = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def qa_scores(predictions: Sequence[str], examples: QaExamples) -> dict[str, float]:
    """SQuAD's metrics, against the best fitting answer of each question; "" is no answer.

    Returns:
        "f1": mean overlap of words, and "exact_match", both in 0..1.

    Raises:
        UserError: not one prediction for each question.
    """
    if len(predictions) != len(examples):
        raise UserError(f"{len(predictions)} predictions for {len(examples)} questions: give all")
    exact = overlap = 0.0
    for prediction, answers in zip(predictions, examples.texts, strict=True):
        said = normalise_answer(prediction)
        # An answer of articles and punctuation alone is none.
        right = [text for text in map(normalise_answer, answers) if text] or [""]
        exact += said in right
        overlap += max(_overlap(said.split(), text.split()) for text in right)
    return {"f1": overlap / len(examples), "exact_match": exact / len(examples)}


def _overlap(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    common = (Counter(said) & Counter(right)).total()
    return 2 * common / (len(said) + len(right))
