"""Question answering: SQuAD's files and scores, windows over long contexts, answers across them."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fastffn.data.encode import encode_task
from fastffn.data.qa import QaExamples, normalise_answer, qa_scores, read_squad
from fastffn.data.tasks import TASKS, TaskData, load_task
from fastffn.data.windows import SpanReader
from fastffn.errors import UserError
from fastffn.evaluate.tasks import evaluate

transformers = pytest.importorskip("transformers")

WORDS = [f"w{k}" for k in range(100)]
SQUAD = TASKS["squad"]


def article(title, *questions):
    """Each question: text, context, answers; no answers: it cannot be answered."""
    paragraphs = [
        {
            "context": context,
            "qas": [
                {
                    "id": f"{title}-{k}",
                    "question": question,
                    "is_impossible": not answers,
                    "answers": [
                        {"text": text, "answer_start": context.index(text)} for text in answers
                    ],
                }
            ],
        }
        for k, (question, context, answers) in enumerate(questions)
    ]
    return {"title": title, "paragraphs": paragraphs}


def write(path, *articles):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": "x", "data": articles}), encoding="utf-8")
    return path


def examples_of(*rows):
    questions, contexts, answers = zip(*rows, strict=True)
    starts = [
        [context.index(text) for text in texts]
        for context, texts in zip(contexts, answers, strict=True)
    ]
    ids = [str(k) for k in range(len(rows))]
    return QaExamples([*questions], [*contexts], ids, starts, [list(texts) for texts in answers])


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", *WORDS]))
    return transformers.BertTokenizer(str(path))


# -- files -------------------------------------------------------------------------------------


def test_squad_files(tmp_path):
    first = article("A", ("Who?", "Ann and Bob.", ["Bob", "Ann"]))
    second = article("B", ("Why?", "Nobody knows.", []))
    write(tmp_path / "squad_v2.0" / "train-v2.0.json", first, second)
    write(tmp_path / "squad_v2.0" / "dev-v2.0.json", second)
    data = load_task("squad2", tmp_path)
    train = data.splits["train"]
    assert train == QaExamples(
        ["Who?", "Why?"],
        ["Ann and Bob.", "Nobody knows."],
        ["A-0", "B-0"],
        [[8, 0], []],
        [["Bob", "Ann"], []],
    )
    assert data.splits["validation"] == train.take([1])
    task = {"name": "mine", "kind": "qa", "train": "train-v2.0.json"}
    own = load_task(task, tmp_path / "squad_v2.0", ("train",))
    assert own.splits["train"] == train and own.task.metrics == ("f1",)


def test_one_file_is_shared_by_article(tmp_path):
    articles = [article(f"title {k}", ("Who?", "Ann.", ["Ann"])) for k in range(48)]
    write(tmp_path / "dev-v1.1.json", *articles)
    data = load_task("squad", tmp_path)
    train, validation = (set(data.splits[split].ids) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (38, 10) and not train & validation
    write(tmp_path / "dev-v1.1.json", *articles[::-1])
    again = load_task("squad", tmp_path, ("validation",))
    assert set(again.splits["validation"].ids) == validation
    write(tmp_path / "train-v1.1.json", *articles[:5])  # then the other is whole
    assert len(load_task("squad", tmp_path).splits["validation"]) == 48


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not in SQuAD's format"),
        ('{"data": [{"title": "A"}]}', "is not in SQuAD's format: KeyError"),
        ('{"data": {"a": 1}}', "is not in SQuAD's format"),
        ('{"data": []}', "split train is empty"),
    ],
)
def test_files_in_another_format(tmp_path, text, message):
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_task("squad", tmp_path)
    assert "\n" not in str(caught.value)


def test_answers_that_are_elsewhere(tmp_path):
    moved = article("A", ("Who?", "Ann and Bob.", ["Bob"]))
    moved["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 7
    with pytest.raises(UserError, match="question A-0: its answer 'Bob' is not at character 7"):
        read_squad([(write(tmp_path / "a.json", moved), "all")])


def test_hub_columns(monkeypatch):
    monkeypatch.delenv("FASTFFN_DATA", raising=False)
    columns = {
        "id": ["1", "2"],
        "question": ["Who?", "Why?"],
        "context": ["Ann and Bob.", "None."],
        "answers": [{"text": ["Bob"], "answer_start": [8]}, {"text": [], "answer_start": []}],
    }
    monkeypatch.setattr("fastffn.data.tasks.hub_split", lambda *_: (columns, "hub"))
    assert load_task("squad2", splits=("train",)).splits["train"] == QaExamples(
        ["Who?", "Why?"], ["Ann and Bob.", "None."], ["1", "2"], [[8], []], [["Bob"], []]
    )


# -- scores ------------------------------------------------------------------------------------


def test_scores_by_hand():
    assert normalise_answer("  The U.S.  is an\tAnthill!") == "us is anthill"
    examples = examples_of(
        ("q", "the big red dog ran", ["big red dog", "dog"]),
        ("q", "in 1973", ["1973"]),
        ("q", "no one knows", []),
        ("q", "no one knows", []),
    )
    values = qa_scores(["a red dog!", "In 1973", "", "one"], examples)
    assert values["exact_match"] == pytest.approx(1 / 4)
    # Overlaps: red, dog of 2 and 3 words; 1973 of 2 and 1.
    assert values["f1"] == pytest.approx((2 * 2 / 5 + 2 / 3 + 1 + 0) / 4)
    with pytest.raises(UserError, match="3 predictions for 4 questions"):
        qa_scores(["", "", ""], examples)


# -- windows -----------------------------------------------------------------------------------


def test_short_contexts_take_one_row(tokenizer):
    examples = examples_of(("who w1", "w2 w3 w4 w5", ["w3 w4"]), ("who", "w9", ["w9"]))
    encoded = encode_task(tokenizer, examples, SQUAD, 32, train=True)
    assert len(encoded) == 2 and encoded.windows is None
    batch = encoded.batch([0, 1])
    wanted = tokenizer(examples.questions, examples.contexts, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], wanted["input_ids"])
    assert torch.equal(batch["token_type_ids"], wanted["token_type_ids"])
    assert batch["start_positions"].tolist() == [5, 3] and batch["end_positions"].tolist() == [6, 3]
    assert batch["start_positions"].dtype == torch.int64 and "labels" not in batch


@pytest.mark.parametrize("max_length", [16, 24, 40])
def test_windows_cover_the_context_and_hold_the_answer(tokenizer, max_length):
    context = " ".join(WORDS)
    examples = examples_of(
        ("who", context, ["w50 w51"]), ("who w1 w2", context, ["w99"]), ("who", context, [])
    )
    encoded = encode_task(tokenizer, examples, SQUAD, max_length, train=False)
    windows = encoded.windows
    assert encoded.lengths.max() == max_length and len(encoded) > 6
    assert sorted(set(windows.example.tolist())) == [0, 1, 2]
    assert np.array_equal(np.sort(windows.example), windows.example)
    for number in range(3):
        covered = set()
        for row in np.flatnonzero(windows.example == number):
            part = slice(windows.offsets[row], windows.offsets[row + 1])
            covered |= set(windows.starts[part].tolist())
        wanted = {context.index(f"w{k}") for k in range(10)} | {
            context.index(w) for w in WORDS[10:]
        }
        assert covered - {-1} == wanted
    starts, ends = encoded.labels.T
    held = starts > 0
    assert held[windows.example == 0].any() and held[windows.example == 1].any()
    assert not held[windows.example == 2].any() and not held.all()
    for row in np.flatnonzero(held):
        first, last = windows.offsets[row] + starts[row], windows.offsets[row] + ends[row]
        text = context[windows.starts[first] : windows.ends[last]]
        assert text == examples.texts[windows.example[row]][0]


def test_many_questions_keep_their_order(tokenizer):
    """More than one call of the tokenizer."""
    rows = [("who", f"w1 {WORDS[k % 100]} w2", [WORDS[k % 100]]) for k in range(3, 1203)]
    examples = examples_of(*rows)
    encoded = encode_task(tokenizer, examples, SQUAD, 16, train=False)
    assert encoded.windows.example.tolist() == list(range(1200))
    reader = SpanReader(encoded.windows)
    logits = np.zeros((1200, 7))
    logits[np.arange(1200), encoded.labels[:, 0]] = 1
    reader.read(np.arange(1200), logits, logits)
    assert reader.answers(examples) == [texts[0] for texts in examples.texts]


def test_answers_within_words_and_with_spaces(tokenizer):
    examples = examples_of(
        ("who", "w1 w22.w33 w4", ["22"]),  # a part of a token
        ("who", "w1 w2 w3", [" w2 "]),
    )
    encoded = encode_task(tokenizer, examples, SQUAD, 32, train=True)
    assert encoded.labels.tolist() == [[4, 4], [4, 4]]


def test_long_questions_are_cut(tokenizer):
    examples = examples_of((" ".join(["who"] * 500), "w1 w2 w3 w4 w5 w6 w7", ["w7"]))
    encoded = encode_task(tokenizer, examples, SQUAD, 16, train=False)
    assert encoded.lengths.max() <= 16 and (encoded.labels[:, 0] > 0).sum() == 1
    assert (encoded.batch([0])["input_ids"] == 5).sum() == 6
    with pytest.raises(UserError, match="no room"):
        encode_task(tokenizer, examples, SQUAD, 4, train=True)
    assert len(encode_task(tokenizer, examples, SQUAD, 5, train=True)) == 7


def test_a_tokenizer_that_does_not_know_characters(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(UserError, match="needs a fast tokenizer"):
        encode_task(tokenizer, examples_of(("who", "w1", ["w1"])), SQUAD, 16, train=True)


# -- evaluation --------------------------------------------------------------------------------


class Reader(nn.Module):
    """Points at the tokens that it is told, with higher scores where it is told so."""

    def __init__(self, targets, none=0.0):
        super().__init__()
        self.targets, self.none = targets, none
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(type_vocab_size=2)

    def forward(self, input_ids, attention_mask, token_type_ids):
        start, end = (torch.zeros(input_ids.shape) for _ in range(2))
        for first, last, score in self.targets:
            start += score * (input_ids == first)
            end += score * (input_ids == last)
        start[:, 0] = end[:, 0] = self.none
        return {"start_logits": start, "end_logits": end}


def scored(tokenizer, examples, reader, max_length=16, batch_size=3):
    data = TaskData(TASKS["squad2"], {"validation": examples})
    encoded = encode_task(tokenizer, examples, SQUAD, max_length, train=False)
    return evaluate(reader, encoded, data, "validation", batch_size)


def ids(tokenizer, *words):
    return tokenizer.convert_tokens_to_ids(list(words))


def test_the_best_span_over_all_windows_is_the_answer(tokenizer):
    context = " ".join(WORDS)
    examples = examples_of(("who", context, ["w70 w71 w72"]), ("who w90", context, ["w70 w71 w72"]))
    weak, strong = (*ids(tokenizer, "w5", "w6"), 1.0), (*ids(tokenizer, "w70", "w72"), 2.0)
    tempting = (*ids(tokenizer, "who", "who"), 9.0)  # the question's own word is no answer
    dull = [(word, word, -3.0) for word in ids(tokenizer, *WORDS)]  # less than all around
    for reader in (Reader([weak, strong]), Reader([strong, tempting]), Reader([*dull, strong])):
        assert scored(tokenizer, examples, reader) == {"f1": 1.0, "exact_match": 1.0}
    swapped = (*ids(tokenizer, "w72", "w70"), 5.0)  # it would end before it begins
    assert scored(tokenizer, examples, Reader([weak, swapped]))["exact_match"] == 0
    data = TaskData(SQUAD, {"validation": examples})
    with pytest.raises(UserError, match="with train=False"):
        evaluate(
            reader, encode_task(tokenizer, examples, SQUAD, 16, train=True), data, "validation"
        )


@pytest.mark.parametrize(("first", "allowed"), [("w10", True), ("w9", False)])
def test_answers_have_at_most_thirty_tokens(tokenizer, first, allowed):
    context = " ".join(WORDS)
    examples = examples_of(
        ("who", context, [context[context.index(first) :].split(" w39")[0] + " w39"])
    )
    told = [(*ids(tokenizer, first, "w11"), 1.0), (*ids(tokenizer, first, "w39"), 3.0)]
    values = scored(tokenizer, examples, Reader(told), max_length=110)
    assert values["exact_match"] == allowed


@pytest.mark.parametrize("none", [-1.0, 3.0])
def test_no_answer_is_said_where_some_have_none(tokenizer, none):
    context = " ".join(WORDS[:30])
    reader = Reader([(*ids(tokenizer, "w20", "w20"), 2.0)], none)
    with_none = examples_of(("who", context, ["w20"]), ("who w1", "w40 w41", []))
    values = scored(tokenizer, with_none, reader)
    # The second one's best span scores 0: more than no answer or less.
    assert values["exact_match"] == (0.5 if none > 2 or none < 0 else 1.0)
    answerable = with_none.take([0])
    assert scored(tokenizer, answerable, reader)["exact_match"] == 1.0
    assert scored(tokenizer, with_none, Reader(reader.targets, 1.0))["exact_match"] == 1.0


# -- real data ---------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("max_length", [128, 384])
def test_real_windows_hold_their_answers(max_length):
    """A reader that knows where the answers are scores nearly all."""
    folder = Path(os.environ["FASTFFN_DATA"])
    tokenizer = transformers.BertTokenizer(str(folder / "bert_uncased_vocab" / "vocab.txt"))
    examples = load_task("squad", folder, ("validation",)).splits["validation"]
    encoded = encode_task(tokenizer, examples, SQUAD, max_length, train=False)
    assert len(encoded) > len(examples)
    rows = np.arange(len(encoded))
    logits = np.zeros((2, len(rows), max_length))
    for side, tokens in zip(logits, encoded.labels.T, strict=True):
        side[rows, tokens] = 5.0 * (tokens > 0)
    reader = SpanReader(encoded.windows)
    reader.read(rows, *logits)
    assert qa_scores(reader.answers(examples), examples)["exact_match"] > 0.98
