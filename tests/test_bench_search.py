"""The benches of a search: contenders of equal size, tables, modules that compute the same."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("optuna")

from bench import search, search_quality
from fastffn import FFN
from fastffn.expr import Gene, gene_cost
from fastffn.search import Space


def test_plain_contenders_have_the_winners_size():
    space = Space(120, 3, rest_params=5_000)
    for params in (60_000, 90_001):
        genes = [Gene.parse(text) for text in search_quality._plain(space, params)]
        found = space.rest_params + sum(gene_cost(gene, 120).params for gene in genes)
        assert len(set(map(str, genes))) == 1 and len(genes) == 3
        step = 3 * (2 * 120 + 1)  # of a column more in each layer
        assert params - step < found <= params


def test_the_table_says_what_chance_gives():
    scores = {"found": 0.9, "plain": 0.8, "random-0": 0.5, "random-1": 0.7, "random-2": 0.6}
    cell = {name: {"score": score, "genes": ["g"]} for name, score in scores.items()}
    unfinished = {"found": cell["found"]}
    text = search_quality.table(
        {"seeds": {"0": {"contenders": cell}, "1": {"contenders": unfinished}}}
    )
    *_, row = text.splitlines()
    assert row == "| 0 | 0.9000 | 0.8000 | 0.6000 | 0.5000–0.7000 | `g` |"


@pytest.mark.parametrize(
    "text",
    [
        "2x1/2 max(down(mul(swish(gate(x)), up(x))), x)",
        "1x1 tanh(down(gelu(up(add(relu(x), x)))))",
        "1x1/3 down(mul(up(x), x))",
    ],
)
def test_the_eager_contender_computes_the_same(text):
    torch.manual_seed(0)
    ffn = FFN(24, text, dropout=0.0).double()
    x = torch.randn(5, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(search.Eager(ffn)(x), ffn(x), rtol=1e-12, atol=1e-12)
