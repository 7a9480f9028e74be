"""`fastffn.export`: what is written, that it is checked, and what is refused."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import TEXTS, classifier, spread, tokenizer
from tiny_teacher import save_teacher

import fastffn
from fastffn import UserError
from fastffn.models import EfficientBertConfig, EfficientBertModel
from fastffn.serve import onnx_export
from fastffn.serve.interface import Interface, difference, probes
from fastffn.serve.manifest import Manifest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model():
    return classifier()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("words") / "teacher")


@pytest.fixture(scope="module")
def graph(model, words, tmp_path_factory):
    """The classifier as ONNX."""
    return fastffn.export(model, tmp_path_factory.mktemp("graph") / "onnx", "onnx", tokenizer=words)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a BERT without a head."""
    return save_teacher(tmp_path_factory.mktemp("bert") / "teacher")


def left_beside(folder):
    return sorted(path.name for path in folder.parent.iterdir())


def test_safetensors_have_the_same_bits(model, words, tmp_path):
    out = fastffn.export(model, tmp_path / "out", tokenizer=words)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (
        again.config.id2label == {0: "bad", 1: "good"} and again.config.genes == model.config.genes
    )
    read = transformers.AutoTokenizer.from_pretrained(out)
    assert read(TEXTS)["input_ids"] == words(TEXTS)["input_ids"]


def test_graph_is_of_the_standard(graph):
    read = onnx.load(graph / "model.onnx")
    onnx.checker.check_model(read)
    assert {node.domain for node in read.graph.node} <= {"", "ai.onnx"} and not read.functions
    assert Manifest.read(graph).checked["opset"] == read.opset_import[0].version >= 20

    def shape(value):
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    names = ["input_ids", "attention_mask", "token_type_ids"]
    assert [v.name for v in read.graph.input] == names
    assert all(shape(v) == ["batch", "length"] for v in read.graph.input)
    assert {v.name: shape(v) for v in read.graph.output} == {"logits": ["batch", 2]}
    assert b".py" not in (graph / "model.onnx").read_bytes()  # nothing of where it was written
    gelu = [node for node in read.graph.node if node.op_type == "Gelu"]
    assert gelu and all(node.attribute[0].s == b"tanh" for node in gelu)


def test_graph_has_the_same_weights(graph, model):
    stored = [
        torch.from_numpy(onnx.numpy_helper.to_array(each).copy())
        for each in onnx.load(graph / "model.onnx").graph.initializer
    ]
    for name, weight in model.state_dict().items():
        forms = (weight, weight.mT) if weight.dim() == 2 else (weight,)
        assert any(
            form.shape == each.shape and torch.equal(form, each)
            for form in forms
            for each in stored
        ), name


def test_graph_agrees_with_torch(graph, model):
    served = fastffn.serve.load(graph)
    interface = served.interface
    assert interface == Interface.of(model) and interface.positions == 32
    batches = probes(interface)
    assert {tuple(b["input_ids"].shape) for b in batches} >= {(1, 1), (2, 32)}
    for batch in batches:
        with torch.no_grad():
            expected = {"logits": model(**batch).logits}
        assert difference(served(**batch), expected, batch["attention_mask"]) <= 1e-5


def test_difference_sees_what_is_wrong():
    mask = torch.tensor([[1, 1, 0]])
    right = {"last_hidden_state": torch.ones(1, 3, 2)}
    padding, token, broken = (torch.ones(1, 3, 2) for _ in range(3))
    padding[0, 2] = 9
    token[0, 1, 0] = 1.5
    broken[0, 0, 0] = torch.nan
    gaps = [difference({"last_hidden_state": x}, right, mask) for x in (padding, token, broken)]
    assert gaps == [0, 0.5, float("inf")]


def test_what_differs_is_not_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "TOLERANCE", 0.0)
    with pytest.raises(UserError, match="differs from torch by"):
        fastffn.export(model, tmp_path / "out", "onnx")
    assert left_beside(tmp_path / "out") == []


def test_int8_is_smaller_and_close(model, words, graph, tmp_path):
    out = fastffn.export(model, tmp_path / "out", "onnx", quantize="int8", tokenizer=words)
    assert [path.name for path in out.glob("*.onnx*")] == ["model_int8.onnx"]
    read = onnx.load(out / "model_int8.onnx")
    assert {node.domain for node in read.graph.node} <= {"", "ai.onnx"}
    kinds = [node.op_type for node in read.graph.node]
    assert kinds.count("MatMulInteger") >= 12  # of 2 layers with 3 units and attention
    found = Manifest.read(out).checked["int8"]
    assert found["cosine"] > 0.99 and found["agreement"] > 0.9 and 0 < found["difference"] < 0.2
    exact, rounded = (fastffn.serve.load(folder).encode(TEXTS) for folder in (graph, out))
    assert 0 < (exact - rounded).abs().max() < 0.2 * exact.abs().max()


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_weights_beyond_a_protobuf_lie_beside_the_graph(model, tmp_path, monkeypatch, quantize):
    monkeypatch.setattr(onnx_export, "_IN_ONE_FILE", 0)
    out = fastffn.export(model, tmp_path / "out", "onnx", quantize=quantize)
    (graph,) = out.glob("*.onnx")
    (data,) = out.glob("*.data")
    assert {graph.name, data.name} <= set(Manifest.read(out).files)
    ids = torch.arange(6, 15)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    found = fastffn.serve.load(out.rename(tmp_path / "moved"))(input_ids=ids)["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if quantize is None else 0.5)


_WITHOUT_FASTFFN = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
batch = {name: torch.ones(3, 5, dtype=torch.long) for name in sys.argv[3:]}
torch.save(program(**batch)["logits"], sys.argv[2])
assert "fastffn" not in sys.modules
"""


def test_program_runs_without_fastffn(model, tmp_path):
    out = fastffn.export(model, tmp_path / "out", "torch-export")
    names = Manifest.read(out).interface.inputs
    files = [str(out / "model.pt2"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", _WITHOUT_FASTFFN, *files, *names], check=True)
    with torch.no_grad():
        expected = model(**{n: torch.ones(3, 5, dtype=torch.long) for n in names}).logits
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    graph = torch.export.load(out / "model.pt2").graph
    called = {n.target.namespace for n in graph.nodes if n.op == "call_function"}
    assert called == {"aten"}


def test_model_is_left_as_it_was(tmp_path):
    model = classifier()
    model.train()
    model.dropout.eval()
    model.set_attn_implementation("sdpa")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fastffn.export(model, tmp_path / "out", "onnx")
    assert model.training and model.efficientbert.training and not model.dropout.training
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_patched_models_are_exported_as_they_were(teacher, tmp_path):
    plain = transformers.AutoModel.from_pretrained(teacher)
    patched = fastffn.patch(transformers.AutoModel.from_pretrained(teacher))
    for format, name in (("safetensors", "model.safetensors"), ("onnx", "model.onnx")):
        files = [
            fastffn.export(each, tmp_path / f"{format}{k}", format, pooling="mean") / name
            for k, each in enumerate((plain, patched))
        ]
        if format == "safetensors":
            assert files[0].read_bytes() == files[1].read_bytes()
            continue
        ids = torch.randint(6, 30, (2, 9), generator=torch.Generator().manual_seed(0))
        first, second = (fastffn.serve.load(file.parent)(input_ids=ids) for file in files)
        assert list(first) == ["last_hidden_state", "sentence_embedding"]
        for output in first:
            torch.testing.assert_close(first[output], second[output], rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "onnx1" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]


def test_half_precision_goes_up_to_float32_in_a_graph(tmp_path):
    model = classifier().to(torch.bfloat16)
    out = fastffn.export(model, tmp_path / "out", "onnx")
    assert model.dtype == torch.bfloat16
    ids = torch.arange(6, 15)[None]
    with torch.no_grad():
        expected = model.float()(input_ids=ids).logits
    torch.testing.assert_close(
        fastffn.serve.load(out)(input_ids=ids)["logits"], expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_sentence_transformers_opens_the_folder(teacher, tmp_path, normalize):
    library = pytest.importorskip("sentence_transformers")
    format = "sentence-transformers"
    out = fastffn.export(teacher, tmp_path / "out", format, pooling="cls", normalize=normalize)
    assert Manifest.read(out).checked == {"max_length": 32, "needs": None}
    opened = library.SentenceTransformer(str(out), device="cpu")
    assert opened.max_seq_length == 32
    served = fastffn.serve.load(out)
    found = torch.from_numpy(opened.encode(TEXTS))
    torch.testing.assert_close(found, served.encode(TEXTS), rtol=1e-5, atol=1e-5)
    lengths = found.norm(dim=-1)
    assert torch.allclose(lengths, torch.ones(len(TEXTS))) == normalize


def test_sentence_transformers_knows_ours_after_an_import(words, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    sizes = {name: getattr(classifier().config, name) for name in ("vocab_size", "genes")}
    config = EfficientBertConfig(
        **sizes, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, embedding_size=8
    )
    torch.manual_seed(0)
    model = spread(EfficientBertModel(config))
    out = fastffn.export(model, tmp_path / "out", "sentence-transformers", tokenizer=words)
    manifest = Manifest.read(out)
    assert manifest.checked["needs"] == "import fastffn.models"
    assert manifest.interface.pooling == "mean"
    found = torch.from_numpy(library.SentenceTransformer(str(out), device="cpu").encode(TEXTS))
    expected = fastffn.serve.load(out).encode(TEXTS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_pooler_without_weights_is_no_output(teacher, tmp_path):
    from safetensors.torch import load_file, save_file

    bare = tmp_path / "bare"
    bare.mkdir()
    for path in teacher.iterdir():
        (bare / path.name).write_bytes(path.read_bytes())
    weights = load_file(teacher / "model.safetensors")
    kept = {name: x for name, x in weights.items() if not name.startswith("pooler.")}
    save_file(kept, bare / "model.safetensors", metadata={"format": "pt"})
    assert fastffn.serve.load(teacher).interface.outputs == ("last_hidden_state", "pooler_output")
    assert fastffn.serve.load(bare).interface.outputs == ("last_hidden_state",)


def test_an_earlier_export_is_replaced(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # empty: fine
    fastffn.export(model, out, "onnx")
    fastffn.export(model, out, "safetensors")
    assert not (out / "model.onnx").exists() and (out / "model.safetensors").is_file()
    assert left_beside(out) == ["out"] and out.stat().st_mode & 0o777 == 0o755
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other things \(notes.txt\)"):
        fastffn.export(model, out, "safetensors")
    assert (out / "notes.txt").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "tflite"}, "format 'tflite' is unknown: choose one of safetensors, onnx"),
        ({"quantize": "int8"}, "quantize is of onnx: leave it out of format safetensors"),
        ({"format": "onnx", "quantize": "int4"}, "quantize 'int4' is unknown"),
        ({"pooling": "mean"}, "EfficientBertForSequenceClassification has a head: pooling is of"),
        ({"format": "sentence-transformers"}, "EfficientBertForSequenceClassification has a head"),
        ({"model": torch.nn.Linear(2, 2)}, "Linear cannot be exported: give the model"),
        ({"model": "nowhere/"}, "model nowhere/ is no directory"),
    ],
)
def test_bad_requests_write_nothing(model, tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr("fastffn.distill.teacher._snapshot", lambda *_, **__: None)
    with pytest.raises(UserError, match="^" + message.replace("(", r"\(")) as raised:
        fastffn.export(**{"model": model, "out": tmp_path / "out"} | changes)
    assert "\n" not in str(raised.value)
    assert left_beside(tmp_path / "out") == []


def test_models_that_are_no_encoders_are_refused(tmp_path):
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 8}
    vision = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=32,
    )
    with pytest.raises(UserError, match="ViTModel is no encoder of tokens"):
        fastffn.export(transformers.ViTModel(vision), tmp_path / "out")
    decoder = transformers.BertConfig(**sizes, is_decoder=True)
    with pytest.raises(UserError, match="BertModel decodes"):
        fastffn.export(transformers.BertModel(decoder), tmp_path / "out")


def test_optimized_models_are_refused(tmp_path):
    model = classifier()
    part = type("Packed", (torch.nn.Module,), {"__module__": "fastffn.serve.packed_encoder"})
    model.efficientbert.encoder = part()
    said = "^an optimized EfficientBertForSequenceClassification cannot be exported: give the model"
    with pytest.raises(UserError, match=said):
        fastffn.export(model, tmp_path / "out")
    loaded = fastffn.serve.load(fastffn.export(classifier(), tmp_path / "again"))
    with pytest.raises(UserError, match=r"^Served cannot be exported: give the model"):
        fastffn.export(loaded, tmp_path / "out")


def test_exports_need_their_extra(model, tmp_path, monkeypatch):
    from fastffn.serve import onnx_session

    monkeypatch.setattr(onnx_session.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"are not installed: pip install \"fastffn\[onnx\]\"$"):
        fastffn.export(model, tmp_path / "out", "onnx")


def test_a_folder_is_not_exported_onto_itself(model, tmp_path):
    out = fastffn.export(model, tmp_path / "out")
    with pytest.raises(UserError, match="is the model itself"):
        fastffn.export(out, out)
    assert fastffn.serve.load(out).kind == "safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "bert",
        "deberta-v2",
        "distilbert",
        "electra",
        "modernbert",
        "mpnet",
        "roberta",
        "xlm-roberta",
    ],
)
@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_other_encoders(kind, format, tmp_path):
    import encoders

    model = encoders.encoder(kind)
    out = fastffn.export(model, tmp_path / "out", format, pooling="mean")
    batch = encoders.batch()
    with torch.no_grad():
        expected = {"last_hidden_state": model(**batch).last_hidden_state}
    found = fastffn.serve.load(out)(**batch)
    gap = difference(found, expected, batch["attention_mask"])
    assert gap <= (1e-5 if format == "onnx" else 1e-6)
