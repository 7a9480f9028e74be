"""`backend.portable`: ops and layers as torch's own functions, eagerly, compiled and exported."""

import threading

import pytest
import torch

from fastffn import FFN, functional
from fastffn.models import EfficientBertConfig, EfficientBertForSequenceClassification
from fastffn.ops import backend

GENES = ["2x1/2 tanh(down(gelu(up(x))))", "1x1 down(mul(swish(gate(x)), up(x)))"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_attention_heads": 2, "embedding_size": 8}
    config = EfficientBertConfig(**sizes, genes=GENES, num_hidden_layers=2)
    return EfficientBertForSequenceClassification(config).eval()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": torch.randint(50, (2, 7)), "attention_mask": mask}


def recorder():
    """A backend of torch.compile that runs what it is given, and the names of what was traced."""
    names = []

    def compiled(graph, inputs):
        names.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    return compiled, names


def ours(names):
    return {name for name in names if "fastffn" in name}


def test_model_is_the_same_in_either_form(model, batch):
    plain = model(**batch).logits
    with backend.portable():
        portable = model(**batch).logits
    assert plain.grad_fn is not None and portable.grad_fn is not None
    torch.testing.assert_close(portable, plain, rtol=1e-5, atol=1e-6)


def test_gradients_are_the_same(model, batch):
    def gradients():
        model.zero_grad()
        model(**batch, labels=torch.tensor([0, 1])).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    with backend.portable():
        portable = gradients()
    for ours_, theirs in zip(plain, portable, strict=True):
        torch.testing.assert_close(theirs, ours_, rtol=1e-4, atol=1e-6)


def test_ops_call_no_kernel_of_ours(monkeypatch):
    def refuse(*_):
        raise AssertionError("an op of fastffn ran")

    x, up, down = torch.randn(3, 8), torch.randn(4, 8), torch.randn(8, 4)
    expected = functional.ffn(x, "tanh(down(gelu(up(x))))", up, None, down, None, None, None)
    for name in ("elementwise", "residual_norm", "ffn"):
        monkeypatch.setattr(f"fastffn.ops.{name}._forward", refuse)
    for name in ("residual_norm", "ffn"):
        monkeypatch.setattr(f"fastffn.ops.{name}._inference", refuse)
    with pytest.raises(AssertionError):
        functional.elementwise("tanh(gelu(a))", a=x)
    with backend.portable():
        functional.elementwise("tanh(gelu(a))", a=x)
        functional.residual_norm(x, x)
        found = functional.ffn(x, "tanh(down(gelu(up(x))))", up, None, down, None, None, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_dropout_needs_no_seed_and_drops():
    torch.manual_seed(0)
    x = torch.ones(64, 32)
    with backend.portable():
        block = FFN(32, "1x1 down(gelu(up(x)))", dropout=0.5)
        assert not torch.equal(block(x), block(x))
        normed = functional.residual_norm(x, torch.zeros_like(x), dropout=0.5)
    assert 0.4 < (normed < 0).float().mean() < 0.6  # what was dropped is below the mean


def test_a_seed_fixes_the_same_mask():
    x, seed = torch.randn(4, 8), torch.tensor([3])
    plain = functional.residual_norm(x, x, dropout=0.5, seed=seed)
    with backend.portable():
        portable = functional.residual_norm(x, x, dropout=0.5, seed=seed)
    torch.testing.assert_close(portable, plain, rtol=1e-5, atol=1e-6)


def test_compiled_forms_live_side_by_side(model, batch):
    compile_, names = recorder()
    compiled = torch.compile(model, backend=compile_, fullgraph=True, dynamic=False)
    with torch.no_grad():
        compiled(**batch)
        assert ours(names)
        names.clear()
        with backend.portable():
            compiled(**batch)
        assert names and not ours(names)
        names.clear()
        compiled(**batch)
        with backend.portable():
            compiled(**batch)
        assert not names  # neither is compiled again


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_torch_export_is_portable_by_itself(model, batch, strict):
    with torch.no_grad():
        program = torch.export.export(model, (), dict(batch), strict=strict)
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert called and all(name.startswith("aten.") for name in called)
    torch.testing.assert_close(
        program.module()(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-6
    )
    assert not backend.is_portable()


def test_it_holds_in_its_thread_alone_and_ends():
    seen = []
    with backend.portable():
        with backend.portable():
            pass
        assert backend.is_portable()
        thread = threading.Thread(target=lambda: seen.append(backend.is_portable()))
        thread.start()
        thread.join()
    assert seen == [False] and not backend.is_portable()
    with pytest.raises(KeyError), backend.portable():
        raise KeyError
    assert not backend.is_portable()
