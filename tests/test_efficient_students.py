"""EfficientBERT students and supernets of recipes: initialised from models, random, refused."""

import pytest
import torch
from encoders import LAYERS, VOCABULARY, batch, encoder
from student_checks import HEADED, NONE, TWO, Spec, headed, outputs, same

from fastffn.distill import gene_files
from fastffn.distill.heads import Head
from fastffn.distill.students import build_student
from fastffn.errors import UserError
from fastffn.expr.found import FoundGenes
from fastffn.models.architectures import Encoder

GENE = "1x3/2 down(gelu_erf(up(x)))"  # the FFN of `encoders.py`


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("head", [NONE, *HEADED], ids=lambda head: head.kind)
@pytest.mark.parametrize("what", ["efficientbert", "supernet"])
def test_efficientbert_of_full_width_is_its_teacher(kind, head, what):
    source = headed(kind, head)
    options = {"from": "t", "hidden_dropout_prob": 0.2}
    options |= {"max_stack": 2, "max_width": 48} if what == "supernet" else {"genes": GENE}
    student = build_student(Spec(**{what: options}), {"t": source}, head)
    assert type(student).__name__.startswith("EfficientBert") and not student.training
    assert student.config.hidden_dropout_prob == 0.2
    assert (student.config.supernet is not None) == (what == "supernet")
    theirs, ours = outputs(source), outputs(student)
    names = set(ours) - {"pooler_output"}  # a mean, where BERT has a dense module
    assert names == set(theirs) - {"pooler_output"}
    for name in names:
        real = batch()["attention_mask"].bool()
        a, b = theirs[name], ours[name]
        if a.shape[:2] == real.shape:
            a, b = a[real], b[real]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_efficientbert_of_some_layers():
    source = headed("bert", TWO)
    spec = Spec(
        efficientbert={
            "from": "t",
            "layers": 2,
            "how": "first",
            "genes": [GENE, "2x1/2 down(gelu(up(x)))"],
            "embedding_size": 8,
            "trigram": True,
        }
    )
    student = build_student(spec, {"t": source}, Head("qa"), seed=4)
    assert student.config.genes == spec.efficientbert["genes"]
    assert student.config.embedding_size == 8 and student.config.trigram
    ours, theirs = Encoder(student).layers[1].attention, source.bert.encoder.layer[1].attention
    assert torch.equal(ours.query.weight, theirs.self.query.weight)
    assert torch.equal(
        student.qa_outputs.weight,
        build_student(spec, {"t": source}, Head("qa"), seed=4).qa_outputs.weight,
    )
    other = build_student(spec, {"t": source}, Head("classification", ("a", "b")), seed=4)
    assert torch.equal(other.dense.weight, source.bert.pooler.dense.weight)
    assert not torch.equal(other.classifier.weight, source.classifier.weight)


def test_efficientbert_with_random_weights():
    options = {"preset": "tiny", "vocab_size": VOCABULARY, "embedding_size": 8}
    student = build_student(Spec(efficientbert=options), {}, TWO, seed=1)
    assert student.config.hidden_size == 360 and outputs(student)["logits"].shape == (2, 2)
    assert same(student, build_student(Spec(efficientbert=options), {}, TWO, seed=1))
    options = {"vocab_size": VOCABULARY, "max_stack": 4, "max_width": 540}
    supernet = build_student(Spec(supernet=options), {}, NONE)
    assert supernet.config.supernet == {"max_stack": 4, "max_width": 540}
    half = build_student(Spec(efficientbert={"vocab_size": 9}, dtype="bfloat16"), {}, NONE)
    assert half.dtype == torch.bfloat16


def test_student_of_a_supernet():
    head = Head("tokens", ("a", "b"))
    options = {"from": "t", "max_stack": 2, "max_width": 64}
    supernet = build_student(Spec(supernet=options), {"t": headed("bert", head)}, head)
    genes = ["2x1 down(gelu(up(x)))", GENE, "1x1/2 down(relu(up(x)))"]
    supernet.set_genes(genes)
    models = {"s": supernet}
    student = build_student(Spec(efficientbert={"from": "s", "genes": genes}), models, head)
    assert student.config.supernet is None and student.config.genes == genes
    for name, tensor in outputs(supernet).items():
        torch.testing.assert_close(outputs(student)[name], tensor)
    one = build_student(Spec(efficientbert={"from": "s", "genes": GENE}), models, NONE)
    assert one.config.genes == [GENE] * LAYERS
    shorter = build_student(Spec(layers_of="s", layers=(0, 2)), models, head)
    assert shorter.config.genes == [genes[0], genes[2]]


def test_genes_of_a_file_and_of_a_name(tmp_path, monkeypatch):
    genes = [GENE, "2x1 down(gelu(up(x)))", "1x1/2 down(relu(up(x)))"]
    values = {"name": "a", "hidden_size": 24, "base": 1, "genes": genes, "quality": 1}
    found = FoundGenes.from_mapping(values, "test")
    path = tmp_path / "genes.yaml"
    path.write_text(found.to_json())
    models = {"t": encoder("bert")}
    student = build_student(Spec(efficientbert={"from": "t", "genes": str(path)}), models, NONE)
    assert student.config.genes == genes
    monkeypatch.setattr(gene_files, "found_genes", lambda: {"mine": found})
    student = build_student(Spec(efficientbert={"from": "t", "genes": "mine"}), models, NONE)
    assert student.config.genes == genes
    options = {"from": "t", "genes": "mine", "ffn_base": 4}
    with pytest.raises(UserError, match="genes mine: found with base 1, and the model has 4"):
        build_student(Spec(efficientbert=options), models, NONE)
    with pytest.raises(UserError, match=r"nowhere\.yaml cannot be read"):
        options = {"from": "t", "genes": str(tmp_path / "nowhere.yaml")}
        build_student(Spec(efficientbert=options), models, NONE)


def test_student_of_some_layers_of_a_supernet():
    options = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    options |= {"max_stack": 2, "max_width": 24, "vocab_size": 99, "embedding_size": 8}
    options["genes"] = ["2x1 down(gelu(up(x)))"] * 3
    supernet = build_student(Spec(supernet=options), {}, NONE)
    genes = ["1x1/2 tanh(down(gelu(up(x))))", "2x1 down(gelu(up(x)))"]
    for layers in ([0, 2], 2):
        spec = Spec(efficientbert={"from": "s", "genes": genes, "layers": layers})
        student = build_student(spec, {"s": supernet}, NONE)
        assert student.config.num_hidden_layers == 2 and student.config.genes == genes
    for layer, source in enumerate((0, 2)):
        theirs = supernet.encoder.layer[source].attention.state_dict()
        spec = Spec(efficientbert={"from": "s", "genes": genes, "layers": [0, 2]})
        ours = build_student(spec, {"s": supernet}, NONE).encoder.layer[layer].attention
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs[name]), name
    with pytest.raises(UserError, match="genes: 2 given for 3 layers"):
        build_student(Spec(efficientbert={"from": "s", "genes": genes}), {"s": supernet}, NONE)


@pytest.mark.parametrize(
    "what, options, message",
    [
        ("efficientbert", {"from": "t", "gene": GENE}, "gene is unknown: did you mean genes"),
        ("efficientbert", {"from": "t", "hidden_size": 8}, "hidden_size is that of the model"),
        ("efficientbert", {"from": "t"}, "multiple of 6 layers, not 3"),
        ("efficientbert", {"from": "t", "genes": GENE, "layers": [5]}, "layers 0 to 2"),
        ("efficientbert", {"from": "d", "genes": GENE}, "no BERT-like encoder"),
        ("efficientbert", {"from": "t", "genes": GENE, "max_stack": 2}, "max_stack is unknown"),
        ("efficientbert", {"preset": "huge"}, "preset: expected one of"),
        ("efficientbert", {"hidden_size": "wide"}, "hidden_size"),
        ("efficientbert", {"from": "t", "genes": GENE, "embedding_size": "a"}, "efficientbert: "),
        ("efficientbert", {"from": "s", "layers": [7]}, "layers 0 to 2"),
        ("efficientbert", {"from": "s", "embedding_size": 8}, "embedding_size is unknown"),
        ("supernet", {"from": "t", "max_stack": 2}, "max_width missing"),
        ("supernet", {"from": "t", "max_stack": 0, "max_width": 9}, "max_stack"),
        ("supernet", {"from": "s", "max_stack": 2, "max_width": 9}, "take it with layers_of"),
    ],
)
def test_bad_options(what, options, message):
    models = {"t": encoder("bert"), "d": encoder("distilbert")}
    models["s"] = build_student(
        Spec(supernet={"from": "t", "max_stack": 1, "max_width": 8}), models, NONE
    )
    with pytest.raises(UserError, match=message) as caught:
        build_student(Spec(**{what: options}), models, NONE)
    assert "\n" not in str(caught.value)
