"""Candidates judged one after the other: the same bits as alone, and fewer layers computed."""

import itertools

import pytest
import torch

from fastffn.errors import UserError

pytest.importorskip("transformers")

from fastffn.distill.capture import capture
from fastffn.models import (
    EfficientBertConfig,
    EfficientBertForSequenceClassification,
    EfficientBertModel,
)
from fastffn.search.oneshot import SharedPrefixes

GENES = ["1x1/2 tanh(down(gelu(up(x))))", "2x1 down(relu(mul(up(x), x)))", "1x1 down(gelu(up(x)))"]
SIZE = {
    "vocab_size": 40,
    "hidden_size": 18,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "genes": [GENES[0]] * 3,
    "embedding_size": 8,
    "max_position_embeddings": 16,
    "supernet": {"max_stack": 2, "max_width": 18},
}
CANDIDATES = sorted(itertools.product(GENES, repeat=3))


def supernet(kind=EfficientBertModel, **changes):
    torch.manual_seed(0)
    return kind(EfficientBertConfig(**(SIZE | changes))).eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    made = []
    for rows, length in ((3, 7), (2, 9)):
        ids = torch.randint(1, 40, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        made.append({"input_ids": ids * mask, "attention_mask": mask})
    return made


def outputs_of(model, candidates, run, shared=None):
    found = []
    with torch.inference_mode():
        for genes in candidates:
            model.set_genes(genes)
            for k, batch in enumerate(batches()):
                if shared is None:
                    found.append(run(model, batch))
                else:
                    with shared.batch(k):
                        found.append(run(model, batch))
    return found


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def hidden(model, batch):
    return model(**batch).last_hidden_state


def test_the_same_bits_and_only_what_differs_is_computed():
    model = supernet()
    alone = outputs_of(model, CANDIDATES, hidden)
    ran = []
    for index, layer in enumerate(model.encoder.layer):
        whole = layer.ffn.forward
        layer.ffn.forward = lambda x, i=index, f=whole: (ran.append(i), f(x))[1]
    with SharedPrefixes(model) as shared:
        assert equal(outputs_of(model, CANDIDATES, hidden, shared), alone)
    # 27 candidates: the last layer's FFN in each, the second's in 9, the first's in 3; two batches.
    assert [ran.count(k) for k in range(3)] == [2 * 3, 2 * 9, 2 * 27]
    assert shared.blocks == 2 * 27 * 6
    attentions = 2 * (1 + 3 + 9)
    assert shared.blocks - shared.saved == len(ran) + attentions
    assert "forward" not in model.encoder.__dict__


def test_any_order_and_afterwards():
    model = supernet()
    order = torch.randperm(len(CANDIDATES), generator=torch.Generator().manual_seed(2)).tolist()
    mixed = [CANDIDATES[k] for k in order]
    alone = outputs_of(model, mixed, hidden)
    with SharedPrefixes(model) as shared:
        assert equal(outputs_of(model, mixed, hidden, shared), alone)
        assert 0 < shared.saved < shared.blocks
        counted = shared.blocks
        assert equal(outputs_of(model, mixed[:3], hidden), alone[:6])  # outside of a batch
        assert shared.blocks == counted
    assert equal(outputs_of(model, mixed, hidden), alone)


def test_a_block_for_each_candidate():
    """The second block goes on with what the first one found; so does one after `clear`."""
    model = supernet()
    alone = outputs_of(model, CANDIDATES, hidden)
    shared, found = SharedPrefixes(model), []
    for genes in CANDIDATES:
        with shared:
            found += outputs_of(model, [genes], hidden, shared)
    assert equal(found, alone) and shared.saved == 2 * (26 + 24 * 2 + 18 * 2)
    assert shared.bytes > 0
    shared.clear()
    saved = shared.saved
    assert shared.bytes == 0
    with shared:
        assert equal(outputs_of(model, CANDIDATES[:1], hidden, shared), alone[:2])
    assert shared.saved == saved


def test_heads_and_autocast():
    model = supernet(EfficientBertForSequenceClassification)

    def run(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**batch).logits

    alone = outputs_of(model, CANDIDATES, run)
    with SharedPrefixes(model) as shared:
        assert equal(outputs_of(model, CANDIDATES, run, shared), alone)
        assert shared.saved > shared.blocks / 2


@pytest.mark.parametrize(
    "layer, what, saved",
    [
        # Of the 26 after the first candidate: 24 have the first gene of the one before.
        (2, "q", 24 * 3 + 2),
        (2, "hidden", 24 * 3 + 2),
        (1, "v", 26),
        (0, "hidden", 0),
        ((), "embeddings", 0),
    ],
)
def test_what_is_read_is_computed(layer, what, saved):
    model = supernet()

    def run(model, batch):
        with capture(model, layer, what) as states:
            model(**batch)
        return states[what]

    alone = outputs_of(model, CANDIDATES, run)
    with SharedPrefixes(model) as shared:
        assert equal(outputs_of(model, CANDIDATES, run, shared), alone)
    assert shared.saved == 2 * saved


@pytest.mark.parametrize("by", ["argument", "config"])
def test_hidden_states_that_are_asked_for(by):
    model = supernet()
    asked = {"output_hidden_states": True} if by == "argument" else {}
    model.config.output_hidden_states = by == "config"

    def run(model, batch):
        return torch.stack(model(**batch, **asked).hidden_states)

    alone = outputs_of(model, CANDIDATES[:5], run)
    with SharedPrefixes(model) as shared:
        assert equal(outputs_of(model, CANDIDATES[:5], run, shared), alone)
        assert shared.saved == 0
        model.config.output_hidden_states = False
        outputs_of(model, CANDIDATES[:5], hidden, shared)  # the recorders are idle again
        assert shared.saved > 0


def test_memory_is_bounded():
    model = supernet()
    alone = outputs_of(model, CANDIDATES, hidden)
    state = 3 * 7 * 18 * 4  # of the first batch
    for states in (0, 1, 2):
        with SharedPrefixes(model, max_bytes=state * states) as shared:
            assert equal(outputs_of(model, CANDIDATES, hidden, shared), alone)
            assert shared.bytes == state * states
            assert (shared.saved > 0) == (states > 0)
    with SharedPrefixes(model) as shared:
        outputs_of(model, CANDIDATES, hidden, shared)
        assert shared.bytes == 3 * (3 * 7 + 2 * 9) * 18 * 4


def test_candidates_of_several_depths():
    model, (batch, _) = supernet(), batches()
    networks = [
        (GENES, None),
        ([GENES[0], GENES[1]], [0, 2]),
        ([GENES[0], GENES[2]], [0, 2]),
        (GENES[:1], [2]),
        ([GENES[0], GENES[1], GENES[0]], None),
    ]

    def judge(shared=None):
        found = []
        with torch.inference_mode():
            for genes, layers in networks:
                model.set_genes(genes, layers)
                if shared is None:
                    found.append(model(**batch).last_hidden_state)
                    continue
                with shared.batch(0):
                    found.append(model(**batch).last_hidden_state)
        return found

    alone = judge()
    with SharedPrefixes(model) as shared:
        for a, b in zip(judge(shared), alone, strict=True):
            assert torch.equal(a, b)
        # first attention; first layer and the attention of layer 2; then other layers come first
        assert shared.saved == 0 + 1 + 3 + 0 + 0


def test_changed_weights_are_noticed():
    model = supernet()
    with SharedPrefixes(model) as shared:
        before = outputs_of(model, CANDIDATES[:1], hidden, shared)
        with torch.no_grad():
            model.embeddings.norm.weight.mul_(2.0)
        after = outputs_of(model, CANDIDATES[:1], hidden, shared)
    assert not equal(before, after)
    assert equal(after, outputs_of(model, CANDIDATES[:1], hidden))


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match="no supernet"):
        SharedPrefixes(supernet(supernet=None))
    model, (first, second) = supernet(), batches()
    with SharedPrefixes(model) as shared, shared.batch(0):
        with pytest.raises(UserError, match="inference_mode"):
            model(**first)
        with torch.inference_mode():
            model(**first)
            with pytest.raises(UserError, match=r"batch 0: was .* another key"):
                model(**second)
            with pytest.raises(UserError, match="eval"):
                model.train()(**first)
