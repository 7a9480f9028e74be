"""Models of recipes: loading with heads, and building from other models, over the families."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from encoders import HEADS, KNOWN, LAYERS, VOCABULARY, WIDTH, batch, encoder
from student_checks import HEADED, NONE, TWO, Spec, headed, outputs, same

from fastffn.distill.heads import Head
from fastffn.distill.students import (
    build_student,
    check_positions,
    check_vocabulary,
    load_model,
    same_tokenizer,
)
from fastffn.errors import UserError
from fastffn.models.architectures import Encoder

FAMILIES = ("bert", "roberta", "distilbert", "electra", "mpnet", "deberta-v2", "modernbert")


@pytest.mark.parametrize("kind", KNOWN)
def test_all_layers_are_the_source(kind):
    source = encoder(kind, attention=None)
    student = build_student(Spec(layers_of="teacher"), {"teacher": source}, NONE)
    assert type(student) is type(source) and not student.training
    assert same(source, student)
    assert student.config.to_dict() | {"dtype": None} == source.config.to_dict()
    theirs = {parameter.data_ptr() for parameter in source.parameters()}
    assert not any(parameter.data_ptr() in theirs for parameter in student.parameters())


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_the_source_s(kind, attention):
    models = {"t": encoder(kind, attention=attention)}
    for spec in (Spec(layers_of="t", layers=2), Spec(like="t", config={"num_hidden_layers": 2})):
        assert build_student(spec, models, TWO).config._attn_implementation == attention


def test_a_layer_that_cannot_stand_elsewhere():
    models = {"t": encoder("modernbert")}
    with pytest.raises(UserError, match=r"no layers\.0\.attn_norm\.weight: .* keep its first"):
        build_student(Spec(layers_of="t", layers=(1, 0)), models, NONE)


@pytest.mark.parametrize("head", HEADED, ids=lambda head: head.kind)
@pytest.mark.parametrize("kind", (*FAMILIES, "efficientbert"))
def test_heads_are_copied(kind, head):
    source = headed(kind, head)
    student = build_student(Spec(layers_of="t"), {"t": source}, head)
    assert same(source, student)


@pytest.mark.parametrize("layers", [(0, 2), (0,), (0, -1), (1, 2), 2])
@pytest.mark.parametrize("kind", KNOWN)
def test_some_layers(kind, layers):
    """The student computes what the source does when it runs these layers only."""
    source = encoder(kind, attention=None)
    student = build_student(Spec(layers_of="t", layers=layers, how="first"), {"t": source}, NONE)
    indices = [k % LAYERS for k in (range(layers) if isinstance(layers, int) else layers)]
    assert len(Encoder(student).layers) == len(indices) == student.config.num_hidden_layers
    if kind == "modernbert" and indices[0]:
        source.layers[indices[0]].attn_norm = torch.nn.Identity()  # as in every first layer
    known = Encoder(source)
    del known.layers[:]
    original = Encoder(encoder(kind, attention=None)).layers
    if kind == "modernbert" and indices[0]:
        original[indices[0]].attn_norm = torch.nn.Identity()
    known.layers.extend(original[k] for k in indices)
    assert same(source, student)


def test_layers_by_number():
    source = encoder("bert")
    for how, index in (("uniform", 2), ("last", 2), ("first", 0), (None, 2)):
        student = build_student(Spec(layers_of="t", layers=1, how=how), {"t": source}, NONE)
        mine, theirs = student.encoder.layer[0], source.encoder.layer[index]
        assert torch.equal(mine.output.dense.weight, theirs.output.dense.weight)
    for layers, message in (((3,), "layers 0 to 2, not 3"), ((), "at least one"), (4, "deeper")):
        with pytest.raises(UserError, match=message):
            build_student(Spec(layers_of="t", layers=layers), {"t": source}, NONE)


@pytest.mark.parametrize("kind", FAMILIES)
def test_students_are_plain_models(kind, tmp_path):
    student = build_student(
        Spec(layers_of="t", layers=(0, 2)), {"t": headed(kind, TWO)}, HEADED[3], seed=3
    )
    student.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(student) and same(loaded, student)
    assert loaded.config.id2label == {0: "O", 1: "B", 2: "I"}


def test_other_heads_are_new_and_seeded():
    source = headed("bert", TWO)
    models = {"t": source}
    other = Head("classification", ("yes", "no"))
    before = torch.get_rng_state()
    student = build_student(Spec(layers_of="t"), models, other, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    again = build_student(Spec(layers_of="t"), models, other, seed=5)
    third = build_student(Spec(layers_of="t"), models, other, seed=6)
    assert torch.equal(student.classifier.weight, again.classifier.weight)
    assert not torch.equal(student.classifier.weight, third.classifier.weight)
    assert not torch.equal(student.classifier.weight, source.classifier.weight)
    assert torch.equal(student.bert.pooler.dense.weight, source.bert.pooler.dense.weight)


def test_dtype_and_pooler():
    source = encoder("bert").to(torch.bfloat16)
    source.pooler = None
    student = build_student(Spec(layers_of="t"), {"t": source}, NONE)
    assert student.dtype == torch.float32 and student.pooler is None
    assert build_student(Spec(layers_of="t", dtype="bfloat16"), {"t": source}, NONE).dtype == (
        torch.bfloat16
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_like(kind):
    source = headed(kind, TWO)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    spec = Spec(like="t", config=sizes)
    student = build_student(spec, {"t": source}, TWO, seed=1)
    assert type(student) is type(source)
    assert Encoder(student).layers[0].state_dict()
    assert len(Encoder(student).layers) == 2 and student.config.hidden_size == 16
    assert student.config.vocab_size == VOCABULARY
    assert outputs(student)["logits"].shape == (2, 2)
    assert same(student, build_student(spec, {"t": source}, TWO, seed=1))
    assert not same(student, build_student(spec, {"t": source}, TWO, seed=2))
    assert source.config.hidden_size == WIDTH


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hiden_size": 16}, "bert has no hiden_size: did you mean hidden_size"),
        ({"hidden_size": 15, "num_attention_heads": HEADS}, "config: .*multiple"),
        ({"hidden_size": "wide"}, "config: .*hidden_size"),
    ],
)
def test_like_with_bad_values(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        build_student(Spec(like="t", config=changes), {"t": encoder("bert")}, NONE)
    assert "\n" not in str(caught.value)


def save(model, directory, words=VOCABULARY):
    """A model with the tokenizer that a small vocabulary makes."""
    model.save_pretrained(directory)
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"w{k}" for k in range(words - len(special))]
    (directory / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    transformers.BertTokenizer(str(directory / "vocab.txt")).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", (*FAMILIES, "xlm-roberta", "efficientbert"))
def test_load(kind, tmp_path):
    source = headed(kind, TWO)
    save(copy.deepcopy(source).half(), tmp_path)
    for parameter in source.parameters():
        parameter.data = parameter.data.half().float()
    loaded = load_model(tmp_path, TWO)
    model = loaded.model
    assert same(model, source) and not model.training and model.dtype == torch.float32
    assert loaded.fresh == () and loaded.origin == str(tmp_path)
    assert len(loaded.tokenizer) == VOCABULARY
    assert load_model(tmp_path, TWO, dtype="bfloat16").model.dtype == torch.bfloat16
    bare = load_model(tmp_path, NONE)
    assert bare.fresh == () and type(bare.model) is type(Encoder(source).base)


@pytest.mark.parametrize("kind", FAMILIES)
def test_load_with_a_new_head(kind, tmp_path):
    save(encoder(kind, "ForMaskedLM", attention=None), tmp_path)
    loaded = load_model(tmp_path, Head("tokens", ("a", "b", "c")), seed=2)
    assert loaded.fresh and all("layer" not in name for name in loaded.fresh)
    assert outputs(loaded.model)["logits"].shape == (2, 9, 3)
    again = load_model(tmp_path, Head("tokens", ("a", "b", "c")), seed=2)
    assert same(loaded.model, again.model)
    bare = load_model(tmp_path, NONE)
    assert bare.fresh == () and getattr(bare.model, "pooler", None) is None


def test_load_with_other_classes(tmp_path):
    save(headed("bert", TWO), tmp_path)
    three = Head("classification", ("a", "b", "c"))
    with pytest.raises(UserError, match=r"has a head of 2 outputs .*, the task needs 3"):
        load_model(tmp_path, three)
    loaded = load_model(tmp_path, three, role="student")
    assert loaded.fresh == ("classifier.bias", "classifier.weight")
    assert loaded.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert 0 < loaded.model.classifier.weight.std() < 0.05
    turned = Head("classification", ("Yes", "No"))
    with pytest.raises(UserError, match="in the order no, yes, the task in the order yes, no"):
        load_model(tmp_path, turned)
    assert load_model(tmp_path, Head("regression"), role="student").model.config.num_labels == 1


@pytest.mark.parametrize("kind", ["bert", "efficientbert"])
def test_a_head_for_another_task_is_not_taken_over(kind, tmp_path):
    source = headed(kind, TWO)
    save(source, tmp_path)
    loaded = load_model(tmp_path, Head("tokens", ("a", "b")), seed=1)
    assert loaded.fresh == ("classifier.bias", "classifier.weight")
    weight = loaded.model.classifier.weight
    assert not torch.equal(weight, source.classifier.weight) and 0 < weight.std() < 0.05
    again = load_model(tmp_path, Head("tokens", ("a", "b")), seed=1)
    assert torch.equal(weight, again.model.classifier.weight)


def test_load_refuses(tmp_path):
    with pytest.raises(UserError, match="student directory nowhere does not exist"):
        load_model(Path("nowhere"), NONE, role="student")
    directory = save(headed("bert", TWO), tmp_path / "t")
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layer.1" not in name}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not whole: .* bert\.encoder\.layer\.1"):
        load_model(directory, TWO)
    gpt = transformers.GPT2Config(vocab_size=60, n_embd=8, n_layer=1, n_head=1)
    save(transformers.GPT2Model(gpt), tmp_path / "gpt")
    with pytest.raises(UserError, match=r"GPT2Model .* is no BERT-like encoder"):
        load_model(tmp_path / "gpt", NONE)
    (directory / "model.safetensors").rename(directory / "model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(directory, TWO)
    (directory / "config.json").write_text(json.dumps({"model_type": "unheard"}))
    with pytest.raises(UserError, match=r"teacher .* cannot be loaded"):
        load_model(directory, TWO)


def test_bad_heads():
    for kind, labels, message in (
        ("classify", (), "choose one of none, classification"),
        ("classification", ("one",), "two labels or more"),
        ("qa", ("a", "b"), "has no labels"),
    ):
        with pytest.raises(UserError, match=message):
            Head(kind, labels)


@pytest.mark.parametrize(
    "kind, positions",
    [("bert", 64), ("distilbert", 64), ("roberta", 62), ("mpnet", 62), ("efficientbert", 64)],
)
def test_positions(kind, positions):
    model = encoder(kind, "ForSequenceClassification")
    check_positions(model, positions)
    long = {key: value[:1].clone() for key, value in batch(positions, positions).items()}
    model(**long)
    with pytest.raises(UserError, match=f"than the {positions} positions"):
        check_positions(model, positions + 1)


@pytest.mark.parametrize("kind", ["deberta-v2", "modernbert"])
def test_positions_without_a_table(kind):
    check_positions(encoder(kind), 100)


def test_tokenizers(tmp_path):
    for name, words in (("a", 60), ("b", 60), ("c", 59)):
        (tmp_path / name).mkdir()
        save(encoder("bert"), tmp_path / name, words)
    a, b, c = (load_model(tmp_path / name, NONE).tokenizer for name in "abc")
    assert same_tokenizer(a, b) and not same_tokenizer(a, c)
    check_vocabulary(encoder("bert"), a)
    with pytest.raises(UserError, match=r"tokenizer has 60 entries, .* for 50: set its vocab_size"):
        check_vocabulary(encoder("bert", vocab_size=50), a)
