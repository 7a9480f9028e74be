"""Metrics by hand-computed values, and the evaluation of models that say what they are told."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastffn.data.catalogue import Task
from fastffn.data.encode import encode_task
from fastffn.data.tasks import Examples, TaskData
from fastffn.errors import UserError
from fastffn.evaluate.metrics import METRICS
from fastffn.evaluate.tasks import evaluate

pytest.importorskip("sklearn")
transformers = pytest.importorskip("transformers")

WORDS = [f"w{k}" for k in range(30)]


def test_metrics_by_hand():
    predictions, labels = np.array([1, 1, 0, 0, 1, 0]), np.array([1, 0, 0, 1, 1, 0])
    tp, tn, fp, fn = 2, 2, 1, 1
    assert METRICS["accuracy"](predictions, labels) == pytest.approx(4 / 6)
    assert METRICS["f1"](predictions, labels) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert METRICS["matthews"](predictions, labels) == pytest.approx((tp * tn - fp * fn) / root)
    three = np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])
    assert METRICS["macro_f1"](*three) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    scores, truth = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0])
    assert METRICS["spearman"](scores, truth) == pytest.approx(0.5)
    assert METRICS["pearson"](scores, truth) == pytest.approx(np.corrcoef(scores, truth)[0, 1])


@pytest.mark.parametrize("name", METRICS)
def test_metrics_where_nothing_varies(name):
    regression = name in ("pearson", "spearman")
    value = METRICS[name](np.zeros(4, float if regression else int), np.array([0, 1, 1, 0]))
    assert isinstance(value, float) and math.isfinite(value)
    if name in ("pearson", "spearman", "matthews", "f1"):
        assert value == 0
    both = np.array([0, 1, 1, 0])
    assert METRICS[name](both, both) == pytest.approx(1)


class Told(nn.Module):
    """Answers by the first word of each row; counts forwards."""

    def __init__(self, answers):
        super().__init__()
        self.answers = nn.Parameter(torch.tensor(answers))
        self.dropout = nn.Dropout(0.9)
        self.widths = []

    def forward(self, input_ids, attention_mask):
        assert torch.is_inference_mode_enabled() and not self.training
        self.widths.append(input_ids.shape[1])
        return {"logits": self.dropout(self.answers[input_ids[:, 1] - 5])}


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    )
    return transformers.BertTokenizer(str(tmp_path / "vocab.txt"))


def data(task, labels):
    texts = [" ".join([WORDS[k], *["w0"] * ((7 * k) % 11)]) for k in range(30)]
    return TaskData(task, {"validation": Examples(texts, None, labels)})


CLASSES = Task("one", labels=("a", "b", "c"), metrics=("accuracy", "macro_f1"))
SCORES = Task("two", kind="regression", metrics=("pearson", "spearman"))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_rows_meet_their_labels_whatever_the_order(tokenizer, training, batch_size):
    told = np.random.default_rng(0).integers(0, 3, 30)
    labels = told.copy()
    labels[:6] = (labels[:6] + 1) % 3
    held = data(CLASSES, labels.tolist())
    encoded = encode_task(tokenizer, held.splits["validation"], CLASSES, 16, train=False)
    model = Told(np.eye(3, dtype=np.float32)[told].tolist()).train(training)
    values = evaluate(model, encoded, held, "validation", batch_size)
    assert list(values) == ["accuracy", "macro_f1"]
    assert values["accuracy"] == pytest.approx(24 / 30)
    assert model.training == training and model.widths == sorted(model.widths)


def test_regression(tokenizer):
    labels = np.random.default_rng(0).normal(size=30).tolist()
    held = data(SCORES, labels)
    encoded = encode_task(tokenizer, held.splits["validation"], SCORES, 16, train=False)
    values = evaluate(Told([[2 * value + 1] for value in labels]), encoded, held, "validation")
    assert values == pytest.approx({"pearson": 1.0, "spearman": 1.0})


def test_a_model_of_transformers(tokenizer):
    config = transformers.BertConfig(
        vocab_size=35,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    held = data(CLASSES, [0] * 30)
    examples = held.splits["validation"]
    with torch.no_grad():
        said = model.eval()(**tokenizer(examples.first, padding=True, return_tensors="pt"))
    held = TaskData(
        CLASSES, {"validation": Examples(examples.first, None, said.logits.argmax(1).tolist())}
    )
    encoded = encode_task(tokenizer, held.splits["validation"], CLASSES, 16, train=False)
    assert evaluate(model, encoded, held, "validation")["accuracy"] == 1


def test_what_does_not_fit_is_refused(tokenizer):
    held = data(CLASSES, [0] * 30)
    encoded = encode_task(tokenizer, held.splits["validation"], CLASSES, 16, train=False)
    with pytest.raises(UserError, match="needs 3 logits a row, the model gives 2"):
        evaluate(Told([[0.0, 1.0]] * 30), encoded, held, "validation")
    model = Told([[0.0, 1.0, math.nan]] * 30).train()
    with pytest.raises(UserError, match="not finite"):
        evaluate(model, encoded, held, "validation")
    assert model.training
    fewer = encode_task(
        tokenizer, held.splits["validation"].take(range(9)), CLASSES, 16, train=False
    )
    with pytest.raises(UserError, match="9 examples were encoded, split validation has 30"):
        evaluate(model, fewer, held, "validation")
