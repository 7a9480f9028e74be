"""`fastffn.serve.load`: every format behind one call, and what is wrong said in one line."""

import concurrent.futures
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from tiny_models import TEXTS, classifier, tokenizer
from tiny_teacher import WORDS, save_teacher

import fastffn
from fastffn import UserError, serve
from fastffn.distill.teacher import sentence_vectors
from fastffn.serve.onnx_session import open_session

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

FILES = {
    "safetensors": "model.safetensors",
    "onnx": "model.onnx",
    "torch-export": "model.pt2",
}


@pytest.fixture(scope="module")
def model():
    return classifier()


@pytest.fixture(scope="module")
def exports(model, tmp_path_factory):
    """The classifier in three formats, with a tokenizer."""
    folder = tmp_path_factory.mktemp("exports")
    words = tokenizer(folder / "words")
    return {
        format: fastffn.export(model, folder / format, format, tokenizer=words) for format in FILES
    }


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("bert") / "teacher")


@pytest.fixture(params=FILES)
def served(request, exports):
    return serve.load(exports[request.param])


@pytest.fixture
def copied(exports, tmp_path):
    """Copies an export, to be damaged."""

    def copy(format):
        return shutil.copytree(exports[format], tmp_path / format)

    return copy


def test_all_formats_give_the_same(served, model, exports):
    assert served.folder == exports[served.kind] and served.quantize is None
    assert served.task == "sequence-classification" and served.labels == ("bad", "good")
    assert served.max_length == served.interface.positions == 32
    ids = torch.randint(6, 30, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    types = torch.zeros_like(ids)
    types[:, 5:] = 1
    with torch.no_grad():
        batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        expected = model(**batch).logits
        bare = model(input_ids=ids).logits
    found = served(**batch)
    assert list(found) == ["logits"]
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-5)
    arrays = served(**{name: x.numpy().astype(np.int32) for name, x in batch.items()})
    assert torch.equal(arrays["logits"], found["logits"])
    alone = served(input_ids=ids, attention_mask=None)["logits"]
    torch.testing.assert_close(alone, bare, rtol=1e-4, atol=1e-5)


def test_texts_are_encoded_in_their_order(served):
    found = served.encode(TEXTS, batch_size=2)
    assert found.shape == (len(TEXTS), 2) and found.dtype == torch.float32
    for text, row in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(served.encode([text])[0], row, rtol=1e-4, atol=1e-5)
    assert served.encode([]).shape == (0, 2)
    pairs = served.encode(TEXTS[:2], pairs=TEXTS[3:5])
    assert not torch.allclose(pairs, found[:2], atol=1e-2)


def test_a_batch_of_no_texts(served):
    assert served(input_ids=torch.zeros(0, 5, dtype=torch.long))["logits"].shape == (0, 2)


def test_threads_share_a_model(served):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(6, 30, (1 + k % 3, 3 + k), generator=generator) for k in range(24)]
    alone = [served(input_ids=ids)["logits"] for ids in batches]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda ids: served(input_ids=ids)["logits"], batches))
    for first, second in zip(alone, together, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "input_ids are missing"),
        ({"input_ids": np.full((1, 33), 7)}, "33 tokens, the model has 32 positions; truncate"),
        ({"input_ids": np.full((1, 0), 7)}, "texts of 0 tokens"),
        ({"input_ids": np.array([[7, 99]])}, "7 to 99, the vocabulary ends at 30"),
        ({"input_ids": np.array([[7, -1]])}, "-1 to 7, the vocabulary ends at 30"),
        ({"input_ids": np.array([7, 8])}, r"int64 \[2\]: integers \[batch, length\]"),
        ({"input_ids": np.array([[0.5]])}, r"input_ids is float64 \[1, 1\]: integers"),
        (
            {"input_ids": np.array([[7, 8]]), "attention_mask": np.array([[1]])},
            r"attention_mask is \[1, 1\] and input_ids are \[1, 2\]",
        ),
        (
            {"input_ids": np.array([[7]]), "pixels": np.array([[7]])},
            "pixels is no input: input_ids",
        ),
    ],
)
def test_bad_batches_are_refused(exports, batch, message):
    with pytest.raises(UserError, match=message) as raised:
        serve.load(exports["onnx"])(**batch)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("format", FILES)
def test_truncated_files_are_noticed(copied, format):
    folder = copied(format)
    file = folder / FILES[format]
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match=f"is not whole: {FILES[format]} has [0-9]+ bytes of"):
        serve.load(folder)
    values = json.loads((folder / "export.json").read_text())
    values["files"][FILES[format]] = file.stat().st_size  # as if it had been written so
    (folder / "export.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as raised:
        serve.load(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_missing_and_damaged_files_are_named(copied, tmp_path):
    folder = copied("onnx")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing; export the model again"):
        serve.load(folder)
    (folder / "export.json").write_text("{")
    with pytest.raises(UserError, match=r"export\.json is damaged: export the model again"):
        serve.load(folder)
    with pytest.raises(UserError, match="does not exist"):
        serve.load(tmp_path / "nowhere")
    newer = copied("safetensors")
    text = (newer / "export.json").read_text()
    (newer / "export.json").write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(UserError, match="is of a newer fastffn"):
        serve.load(newer)


def test_onnxruntime_is_asked_for(exports, monkeypatch):
    from fastffn.serve import onnx_session

    monkeypatch.setattr(onnx_session.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install \"fastffn\[onnx\]\"$"):
        serve.load(exports["onnx"])


def test_threads_of_a_session(exports):
    session = open_session(exports["onnx"] / "model.onnx", threads=1)
    assert session.get_session_options().intra_op_num_threads == 1


def test_a_model_of_others_is_loaded_too(teacher):
    served = serve.load(teacher)
    assert (served.kind, served.task, served.labels) == ("safetensors", "embedding", None)
    with pytest.raises(UserError, match="makes no vector of a text: export it with pooling"):
        served.encode(TEXTS)
    model = transformers.AutoModel.from_pretrained(teacher)
    batch = served.tokenizer(
        TEXTS, padding=True, truncation=True, max_length=32, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    expected = sentence_vectors(hidden, batch["attention_mask"], unit=False)
    found = served.encode(TEXTS, pooling="mean")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_other_heads_are_told_apart(teacher):
    for name, task in (
        ("AutoModelForTokenClassification", "token-classification"),
        ("AutoModelForQuestionAnswering", "question-answering"),
        ("AutoModelForMaskedLM", "masked-lm"),
    ):
        model = getattr(transformers, name).from_pretrained(teacher)
        folder = teacher.parent / task
        served = serve.load(fastffn.export(model, folder))
        assert served.task == task and served.tokenizer is None
        assert served.labels == (("LABEL_0", "LABEL_1") if task.startswith("token") else None)
        found = served(input_ids=torch.full((2, 5), 7))
        with torch.no_grad():
            expected = model.eval()(torch.full((2, 5), 7))
        for output, value in found.items():
            torch.testing.assert_close(value, expected[output])
        with pytest.raises(UserError, match="has no tokenizer"):
            served.encode(WORDS)
