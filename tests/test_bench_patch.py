"""The bench of patched encoders: all contenders run on the same weights, and agree."""

import pytest
import torch

pytest.importorskip("transformers")

from bench.harness import _Recorder, check_outputs
from bench.test_patch import Encoders, measure
from fastffn.models import seams

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
}


@pytest.mark.parametrize("training", [False, True])
def test_contenders_share_their_weights(training):
    encoders = Encoders(TINY, 2, 5, torch.float32, "cpu")
    pairs = zip(encoders.model.parameters(), encoders.patched.parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    assert not any(isinstance(m, seams.Patched) for m in encoders.model.modules())
    works = encoders.works(training)
    assert {*works} == {"fastffn", "eager", "torch.compile", "both"}
    eager = {name: works[name] for name in ("fastffn", "eager")}
    check_outputs(eager, encoders.exact(training))
    quiet = {name: work() for name, work in eager.items()}
    encoders.drop(0.5)
    for name, work in eager.items():
        assert not torch.equal(work()[0], quiet[name][0])


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["inference", "training with dropout"])
def test_a_case_is_measured(direction):
    recorder = _Recorder()
    measure(recorder, TINY, 2, 5, torch.float32, direction, "cpu")
    assert {*recorder.extra_info["ratio"]} == {"eager", "torch.compile", "both"}
