"""What a search leaves for others: the winner's genes, its configuration, a recipe to train it.

    genes.yaml      the genes and the conditions under which they were found (`read_found`)
    config.json     the configuration of the winner as a model of its own
    student.yaml    a distillation recipe: `fastffn distill student.yaml` trains the winner

The student is cut out of the supernet, where the search has left one, and goes through the stages
that candidates went through; where candidates were judged untrained, through the supernet's. Those
are short: a candidate is trained just long enough to be told from others. So the recipe says that
its steps are to be raised, and leaves by how much to whoever runs it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..distill.gene_files import read_found
from ..errors import UserError
from ..expr import Gene
from ..expr.found import FoundGenes
from ..files import write_text_atomic

if TYPE_CHECKING:
    from ..distill.recipe import Recipe

_SUPERNET, _CANDIDATE, _STUDENT = "supernet", "candidate", "student"
_COSTS = ("params", "macs", "latency")


def export(
    report: Mapping[str, Any],
    folder: str | Path,
    supernet_config: Mapping[str, Any] | None = None,
    distil: "Recipe | None" = None,
) -> list[Path]:
    """Writes the winner's files.

    Args:
        report: of a search that has a winner.
        folder: made if need be; files of the same names are replaced.
        supernet_config: values of the supernet's `EfficientBertConfig`; None: no config.json.
        distil: the search recipe's distillation part; None: no student.yaml.

    Returns:
        The files.

    Raises:
        UserError: the report has no winner, or the configuration cannot have its genes.
    """
    found = conditions(report)
    texts = {"genes.yaml": _yaml(found.to_mapping())}
    if supernet_config is not None:
        texts["config.json"] = _config(found, supernet_config)
    if distil is not None:
        layers = None
        if supernet_config is not None and len(found.genes) < supernet_config["num_hidden_layers"]:
            from ..distill.subnetworks import kept_layers

            layers = kept_layers(len(found.genes), supernet_config["num_hidden_layers"])
        texts["student.yaml"] = student_recipe(report, distil, layers).to_yaml()
    paths = [Path(folder) / name for name in texts]
    for path in paths:
        write_text_atomic(path, texts[path.name])
    return paths


def conditions(report: Mapping[str, Any]) -> FoundGenes:
    """The winner with what is known about how it was found.

    Raises:
        UserError: the report has no winner.
    """
    if not report.get("genes"):
        raise UserError(f"search {report['name']}: no candidate is finished, so none has won")
    space, best = report["space"], report["best"]
    of_stage = next((s for s in report["stages"] if s["name"] == best.get("stage")), {})
    said = {
        "quality": best["quality"],
        "score": of_stage.get("score"),
        "objectives": list(report["objectives"]),
        **{name: best.get(name) for name in _COSTS},  # latency in microseconds
        "stage": best.get("stage"),
        "candidates": sum(stage["finished"] + stage["pruned"] for stage in report["stages"]),
        "seconds": report.get("seconds"),
        "seed": report["seed"],
        "machine": report.get("machine"),
        "versions": report.get("versions"),
        "space": dict(space),
    }
    said = {key: value for key, value in said.items() if value is not None}
    base = space.get("base", 1)
    genes = tuple(Gene.parse(text, base) for text in report["genes"])
    return FoundGenes(report["name"], space["hidden_size"], genes, said)


def read_genes(path: str | Path) -> tuple[Gene, ...]:
    """The genes of a file that `export` wrote, one per layer. Raises as `read_found`."""
    return read_found(path).genes


def student_recipe(
    report: Mapping[str, Any], distil: "Recipe", layers: Sequence[int] | None = None
) -> "Recipe":
    """The distillation recipe that trains the winner.

    Args:
        report: its "supernet" is the folder of the trained one, from which the student is cut;
            None: the recipe trains a supernet first.
        distil: the search recipe's distillation part.
        layers: those of the supernet that the winner has; None: all.
    """
    from ..distill.recipe_parts import ModelSpec

    kept, own = [], []
    for stage in distil.stages:
        if stage.student == (_CANDIDATE,):
            own.append(stage)
        elif stage.student == (_SUPERNET,):
            kept.append(stage)
    own = own or [
        dataclasses.replace(stage, subnetworks=None, depths=(), ratios=()) for stage in kept
    ]
    own = [dataclasses.replace(stage, student=(_STUDENT,)) for stage in own]
    path = report.get("supernet")
    if path is not None:
        kept = []
    names = {stage.name for stage in kept}  # where both train, their names must differ
    own = [dataclasses.replace(s, name=f"student-{s.name}") if s.name in names else s for s in own]
    models = dict(distil.models)
    models.pop(_CANDIDATE, None)
    if path is not None:
        models[_SUPERNET] = ModelSpec(load=str(path))
    options = {"from": _SUPERNET, "genes": list(report["genes"])}
    if layers is not None:
        options["layers"] = list(layers)
    models[_STUDENT] = ModelSpec(efficientbert=options)
    stages = (*kept, *own)
    models = _reached(models, {s.teacher for s in stages} | {_STUDENT})
    return dataclasses.replace(
        distil,
        name=f"{distil.name}-student",
        description=(
            f"The winner of the search {distil.name}, quality {report['best']['quality']:.4g} "
            "there. The stages are those of the search's candidates, which are short: raise their "
            "steps."
        ),
        models=models,
        data={name: spec for name, spec in distil.data.items() if name in {s.data for s in stages}},
        stages=stages,
    )


def _reached(models: dict[str, Any], first: set[str | None]) -> dict[str, Any]:
    """The models of these names, and those that they are made from."""
    found, waiting = set(), {name for name in first if name is not None}
    while waiting:
        name = waiting.pop()
        found.add(name)
        parent = models[name].parent
        if parent is not None and parent not in found:
            waiting.add(parent)
    return {name: spec for name, spec in models.items() if name in found}


def _config(found: FoundGenes, supernet_config: Mapping[str, Any]) -> str:
    from ..models import EfficientBertConfig

    own = {"genes": found.texts, "num_hidden_layers": len(found.genes)}
    own |= {"supernet": None, "kept_layers": None}
    return EfficientBertConfig.from_dict({**supernet_config, **own}).to_json_string()


def _yaml(values: Mapping[str, Any]) -> str:
    from ..distill.recipe_yaml import dump

    return dump(dict(values))
