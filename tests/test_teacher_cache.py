"""The stored teacher outputs: what the teacher says, reused for the same work, never half made."""

import pickle
import shutil

import numpy as np
import pytest
import torch

from fastffn.distill.batches import CacheCollator, LengthSampler, SentenceNumbers
from fastffn.distill.cache import TeacherCache
from fastffn.distill.capture import capture
from fastffn.distill.teacher import Teacher, sentence_vectors
from fastffn.errors import UserError

transformers = pytest.importorskip("transformers")

WORDS = "a small model can teach another one the same thing again and".split()
SENTENCES = [
    " ".join(WORDS[(k + j) % len(WORDS)] for j in range(1 + (7 * k) % 11)) for k in range(40)
]


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=32,
    )
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8"
    )
    model = transformers.BertModel(config).eval().requires_grad_(False)
    return Teacher(model, transformers.BertTokenizer(str(vocabulary)), "a test", "mean")


@pytest.fixture
def compute(teacher, tmp_path):
    def compute(sentences=SENTENCES, teacher=teacher, directory=tmp_path / "cache", **options):
        options = {"hidden_layers": (0, 2, -1), "tokens_per_batch": 50, **options}
        return TeacherCache.open_or_compute(directory, teacher, sentences, **options)

    return compute


@pytest.fixture
def forwards(teacher):
    """A list that grows with each forward of the teacher."""
    calls = []
    teacher.model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_batches_hold_what_the_teacher_says(compute, teacher):
    cache = compute()
    assert cache.outputs == ("hidden_0", "hidden_2", "hidden_3", "q", "k", "v", "vector")
    assert len(cache) == len(SENTENCES)
    chosen = [5, 0, 31, 5]
    batch = cache.batch(chosen)
    inputs = teacher.tokenizer([SENTENCES[k] for k in chosen], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], inputs["input_ids"])
    assert torch.equal(batch["attention_mask"], inputs["attention_mask"])
    with torch.inference_mode(), capture(teacher.model, 2) as states:
        hidden = teacher.model(**inputs, output_hidden_states=True).hidden_states
    expected = {f"hidden_{k}": hidden[k] for k in (0, 2, 3)} | {k: states[k] for k in "qkv"}
    real = inputs["attention_mask"].bool()
    for name, values in expected.items():
        actual = batch[f"teacher_{name}"]
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual[real], values[real], atol=2e-3, rtol=1e-3)
        assert actual[~real].eq(0).all()
    vectors = sentence_vectors(hidden[-1], inputs["attention_mask"])
    torch.testing.assert_close(batch["teacher_vector"], vectors, atol=1e-3, rtol=0)


def test_a_phase_reads_only_what_it_asks_for(compute):
    batch = compute().batch([1, 2], outputs=("vector",))
    assert set(batch) == {"input_ids", "attention_mask", "teacher_vector"}
    with pytest.raises(UserError, match="no \\['hidden_1'\\]"):
        compute().batch([1], outputs=("hidden_1",))


def test_second_run_computes_nothing(compute, forwards):
    seen = []
    first = compute(progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (first.lengths.sum(), first.lengths.sum())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    count = len(forwards)
    second = compute()
    assert len(forwards) == count > 1
    assert torch.equal(first.batch([3])["teacher_v"], second.batch([3])["teacher_v"])


def test_anything_that_matters_computes_again(compute, teacher, forwards):
    compute()
    changes = [
        {"sentences": SENTENCES[:-1]},
        {"sentences": SENTENCES[::-1]},
        {"max_length": 6},
        {"hidden_layers": (0,)},
        {"relation_layer": 0},
        {"relation_layer": None},
        {"teacher": teacher._replace(pooling="cls")},
    ]
    for change in changes:
        before = len(forwards)
        compute(**change)
        assert len(forwards) > before, change
    compute()
    before = len(forwards)
    teacher.model.encoder.layer[0].output.dense.bias += 1e-3
    compute()
    assert len(forwards) > before


def test_a_killed_run_leaves_no_cache(compute, tmp_path, forwards):
    class Killed(BaseException):
        pass

    def kill(done, total):
        raise Killed

    compute()  # an older, whole cache of something else
    with pytest.raises(Killed):
        compute(sentences=SENTENCES[1:], progress=kill)
    with pytest.raises(UserError, match="holds no teacher outputs"):
        TeacherCache(tmp_path / "cache")
    before = len(forwards)
    assert len(compute(sentences=SENTENCES[1:])) == len(SENTENCES) - 1
    assert len(forwards) > before


def test_long_sentences_are_cut(compute):
    cache = compute(max_length=6)
    assert cache.lengths.max() == 6
    assert cache.batch([6])["input_ids"][0, -1] == 3  # [SEP] stays


def test_values_beyond_half_precision_are_refused(compute, teacher, tmp_path):
    teacher.model.encoder.layer[2].attention.self.value.bias += 1e5
    with pytest.raises(UserError, match="teacher's v does not fit half precision"):
        compute()
    with pytest.raises(UserError):
        TeacherCache(tmp_path / "cache")


def test_bad_input_is_named(compute, monkeypatch):
    with pytest.raises(UserError, match="no sentences"):
        compute(sentences=[])
    with pytest.raises(UserError, match="layer 4 does not exist: choose from 0 to 3"):
        compute(hidden_layers=(4,))
    with pytest.raises(UserError, match="layer 3 does not exist: choose from 0 to 2"):
        compute(relation_layer=3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": 10}))
    with pytest.raises(UserError, match="make room"):
        compute()


def test_pickles_by_directory(compute):
    cache = compute()
    data = pickle.dumps(cache)
    assert len(data) < 500
    assert torch.equal(pickle.loads(data).batch([4])["teacher_q"], cache.batch([4])["teacher_q"])


def test_sampler_visits_all_alike_each_time_and_groups_lengths():
    lengths = np.random.default_rng(0).integers(3, 100, 1003)
    sampler = LengthSampler(lengths, 8, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(1003))
    assert list(LengthSampler(lengths, 8, seed=1)) == first
    assert list(LengthSampler(lengths, 8, seed=2)) != first
    sampler.set_epoch(1)
    assert list(sampler) != first
    batches = np.array(first[:1000]).reshape(-1, 8)
    padded = lengths[batches].max(axis=1).sum() * 8
    assert padded < 1.1 * lengths[batches].sum()
    assert list(LengthSampler([4, 5], 8)) in ([0, 1], [1, 0])


def test_trainer_reads_the_cache(compute, tmp_path):
    pytest.importorskip("accelerate")
    cache = compute()
    orders = []

    class Student(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(20, 12)

        def forward(self, input_ids, attention_mask, teacher_vector):
            orders[-1].append(input_ids)
            vectors = sentence_vectors(self.table(input_ids), attention_mask)
            return {"loss": (vectors - teacher_vector).square().mean()}

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, dataset=None):
            return LengthSampler(cache.lengths, self.args.per_device_train_batch_size)

    def train():
        orders.append([])
        torch.manual_seed(0)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=8,
            num_train_epochs=2,
            learning_rate=0.1,
            report_to="none",
            save_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
            label_names=[],
        )
        trainer = Trainer(
            Student(),
            arguments,
            train_dataset=SentenceNumbers(len(cache)),
            data_collator=CacheCollator(cache, ("vector",)),
        )
        return trainer.train().training_loss

    first, second = train(), train()
    assert first == second
    assert len(orders[0]) == 10
    assert all(torch.equal(a, b) for a, b in zip(*orders, strict=True))
    epochs = [sorted(map(str, orders[0][k : k + 5])) for k in (0, 5)]
    assert epochs[0] != epochs[1]  # set_epoch reached the sampler
