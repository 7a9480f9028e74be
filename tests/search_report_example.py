"""The report of a search as the engine makes it, invented figures: for tests of what shows it."""

from collections.abc import Mapping
from fractions import Fraction
from random import Random

from fastffn.expr import Gene, gene_cost
from fastffn.search.grammar import Grammar

PRIMITIVES = ("relu", "leaky_relu", "gelu", "tanh", "elu", "sigmoid", "swish", "add", "mul", "max")
RATIOS = ("1/4", "1/3", "1/2", "1")
FREEZE = {"coarse": None, "middle": "shapes", "fine": "functions"}


def example(
    layers: int = 3,
    counts: Mapping[str, int] | None = None,
    latency: bool = False,
    objectives: tuple[str, ...] = ("quality",),
    hidden: int = 384,
    seed: int = 0,
) -> dict:
    """A new report; tests may change it.

    Args:
        counts: candidates of each stage; stages called "middle" and "fine" freeze the best one's
            shapes and functions.
        latency: whether candidates have one.
    """
    rng = Random(seed)
    grammar = Grammar(PRIMITIVES, (3, 7), 20)
    records, stages, best = [], [], None
    for name, count in (counts or {"coarse": 24, "middle": 12, "fine": 12}).items():
        freeze = FREEZE.get(name)
        ours = [
            _record(rng, grammar, layers, hidden, latency, number, freeze, best)
            for number in range(count)
        ]
        records += [{"stage": name, **record} for record in ours]
        finished = [record for record in records if not record["pruned"]]
        best = max(finished, key=lambda record: (record["quality"], -record["params"]))
        pruned = sum(record["pruned"] for record in ours)
        seconds = 1.7 * count
        stages.append(
            {
                "name": name,
                "trials": count,
                "finished": count - pruned,
                "pruned": pruned,
                "diverged": count // 20,
                "seconds": seconds,
                "candidates_per_minute": 60 * count / seconds,
                "freeze": freeze,
                "proposals": "evolution",
            }
        )
    costs = [name for name in objectives if name != "quality"] or ["params"]
    return {
        "name": "example",
        "seed": seed,
        "objectives": list(objectives),
        "genes": best["genes"],
        "best": best,
        "front": _front([r for r in records if not r["pruned"]], costs[0]),
        "stages": stages,
        "candidates": records,
        "space": {
            "hidden_size": hidden,
            "num_layers": layers,
            "base": 1,
            "params": [None, int(1.05 * max(record["params"] for record in records))],
            "ratios": list(RATIOS),
        },
        "supernet": None,
        "seconds": sum(stage["seconds"] for stage in stages),
        "machine": {"cpu": "Some processor, 2.4 GHz", "cores": 2},
        "versions": {"fastffn": "0.1.0", "torch": "2.13.0"},
    }


def _record(rng, grammar, layers, hidden, latency, number, freeze, best) -> dict:
    genes = []
    for layer in range(layers):
        kept = Gene.parse(best["genes"][layer]) if best else None
        stack, ratio = rng.choice((1, 1, 1, 2, 2, 3, 4)), Fraction(rng.choice(RATIOS))
        expr = grammar.random(rng, False, True)
        if freeze == "shapes":
            stack, ratio = kept.stack, kept.ratio
        if freeze == "functions":
            expr = kept.expr
        genes.append(Gene(stack, ratio, expr))
    params = sum(gene_cost(gene, hidden).params for gene in genes) + 1_900_000
    liked = sum("gelu" in str(gene) for gene in genes) / layers
    quality = 0.66 + 0.03 * (params / 1e6) ** 0.5 + 0.05 * liked + rng.gauss(0, 0.012)
    pruned = number > 9 and rng.random() < 0.3
    found = {
        "number": number,
        "genes": [str(gene) for gene in genes],
        "params": params,
        "macs": params - 10_000,
        "latency": int(2_000 + params / 900 + rng.gauss(0, 300)) if latency else None,
        "quality": quality - 0.05 * pruned,
        "rungs": [quality - 0.05] if pruned else [quality - 0.05, quality],
        "pruned": pruned,
        "seconds": 1.6,
        "fingerprint": f"{rng.getrandbits(64):016x}",
        "inherited": False,
        "worker": "host:1",
    }
    return found


def _front(records: list[dict], cost: str) -> list[dict]:
    found: list[dict] = []
    for record in sorted(records, key=lambda record: (record[cost], -record["quality"])):
        if not found or record["quality"] > found[-1]["quality"]:
            found.append(record)
    return found
