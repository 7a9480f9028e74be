"""Capture in training: gradients, checkpointing, data parallelism, compiled models."""

import weakref

import pytest
import torch
from encoders import WIDTH, batch, encoder
from torch import nn

from fastffn import capture
from fastffn.errors import UserError


def test_a_student_learns_through_what_is_captured():
    student, teacher = encoder("efficientbert"), encoder("distilbert")
    with (
        capture(student, -1, ("q", "hidden", "embeddings", "scores")) as ours,
        torch.inference_mode(),
        capture(teacher, 1, ("q", "hidden", "scores"), stop=True) as theirs,
    ):
        teacher(**batch())
        with torch.inference_mode(False):
            student(**batch())
    assert not theirs["q"].requires_grad
    for tensor in (ours["q"], ours["scores"].k, ours["hidden"], ours["embeddings"]):
        student.zero_grad()
        tensor.square().sum().backward(retain_graph=True)
        assert student.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    target = theirs["q"].clone()
    student.zero_grad()
    (ours["q"] - target).square().mean().backward()
    assert student.encoder.layer[2].attention.query.weight.grad.abs().sum() > 0
    assert student.encoder.layer[2].attention.value.weight.grad is None


def test_the_last_forward_counts():
    model = encoder("bert")
    with capture(model, 0, "q") as states:
        model(**batch())
        first = states["q"]
        model(**batch(length=4, shortest=2))
    assert first.shape == (2, 9, WIDTH) and states["q"].shape == (2, 4, WIDTH)


def test_a_forward_that_fails_leaves_nothing():
    model = encoder("bert")
    value = model.encoder.layer[0].attention.self.value  # comes after the query
    with capture(model, 0, "q") as states:
        model(**batch())
        failing = value.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch())
        assert not states
        failing.remove()
        model(**batch(length=4, shortest=2))
        assert states["q"].shape == (2, 4, WIDTH)


@pytest.mark.filterwarnings("ignore:.*checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "modernbert", "efficientbert"])
def test_gradient_checkpointing_keeps_the_first_computation(kind):
    gradients = []
    for checkpointing in (False, True):
        model = encoder(kind).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with capture(model, 1) as states:
            model(**batch())
            before = dict(states)
            (states["q"].square().sum() + states["hidden"].square().sum()).backward()
            assert all(states[name] is before[name] for name in before)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:.*checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_keeps_nothing_of_the_second_computation():
    model, outputs = encoder("bert").train(), []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    query = model.encoder.layer[1].attention.self.query
    query.register_forward_hook(lambda *args: outputs.append(weakref.ref(args[2])))
    with capture(model, 1) as states:
        model(**batch())
        states["hidden"].sum().backward()
        assert len(outputs) == 2 and outputs[0]() is states["q"] and outputs[1]() is None


@pytest.mark.filterwarnings("ignore:.*checkpointing_enable:FutureWarning")
def test_reentrant_checkpointing_is_refused():
    model = encoder("bert").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UserError, match="use_reentrant=True"), capture(model, 1):
        model(**batch())


def test_a_model_in_distributed_data_parallel():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = encoder("bert", "ForMaskedLM")
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        with capture(wrapped, 1) as states:
            wrapped(**batch())
        states["q"].sum().backward()
        with capture(model, 1) as expected:
            model(**batch())
        assert torch.equal(states["q"], expected["q"])
    finally:
        torch.distributed.destroy_process_group()


def test_data_parallel_on_one_device_and_on_several():
    model = encoder("bert")
    with capture(nn.DataParallel(model), 1) as states:
        nn.DataParallel(model)(**batch())
    assert states["q"].shape == (2, 9, WIDTH)
    with pytest.raises(UserError, match="DataParallel splits the batch"), capture(model, 0):
        replica = model.encoder.layer[0]._replicate_for_data_parallel()
        replica(torch.zeros(1, 2, WIDTH))


@pytest.mark.parametrize(("kind", "stop"), [("bert", False), ("bert", True), ("modernbert", True)])
def test_a_compiled_model_stays_compiled(kind, stop):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = encoder(kind)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        with capture(compiled, 0, ("q", "hidden", "scores"), stop=stop) as states:
            compiled(**batch())
        with capture(model, 0, ("q", "hidden")) as expected:
            model(**batch())
        torch.testing.assert_close(states["q"], expected["q"])
        torch.testing.assert_close(states["hidden"], expected["hidden"])
    assert graphs


def test_a_model_compiled_without_the_hooks_is_told():
    torch._dynamo.reset()
    model = encoder("bert")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(**batch())
        with pytest.raises(UserError, match="called in such blocks only"), capture(compiled, 1):
            compiled(**batch())
