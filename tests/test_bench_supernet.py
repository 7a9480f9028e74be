"""The bench of a supernet's step: its contenders run, and a wrong one is not timed."""

import pytest

pytest.importorskip("transformers")

from bench.supernet import COUNT, Case, Step, measured
from fastffn.distill import stage_module

TINY = Case(
    {"hidden_size": 24, "num_hidden_layers": 4, "intermediate_size": 48},
    {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "genes": ["1x1 down(gelu(up(x)))"] * 2,
        "supernet": {"max_stack": 2, "max_width": 12},
        "embedding_size": 4,
    },
    {"relations": {"relation_heads": 3}, "hidden": {"embeddings": True}},
)


@pytest.mark.parametrize("live", [True, False])
def test_contenders(live, monkeypatch):
    step = Step(TINY, rows=2, length=8, device="cpu", precision="fp32", live=live)
    step.check()
    ran, passes = [], []
    genes, read = step.supernet.set_genes, stage_module.read
    step.supernet.set_genes = lambda *network: (ran.append(network), genes(*network))
    monkeypatch.setattr("bench.supernet.read", lambda *a, **k: (passes.append(1), read(*a, **k))[1])
    counted = {}
    for name, work in step.works().items():
        ran.clear()
        work()
        counted[name] = len(ran)
    assert counted == {"four": COUNT, "apart": COUNT, "largest": 1, "random": 1}
    assert len(passes) == (4 if live else 0)
    times = measured({"four": step.works()["four"]}, rounds=3, device="cpu")
    assert times["four"] > 0


def test_a_wrong_contender_is_refused(monkeypatch):
    step = Step(TINY, rows=2, length=8, device="cpu", precision="bf16", live=False)
    whole = stage_module.read_each

    def wrong(*arguments):
        found = whole(*arguments)
        return [*found[:-1], found[0]]

    monkeypatch.setattr(stage_module, "read_each", wrong)
    with pytest.raises(AssertionError):
        step.check()
