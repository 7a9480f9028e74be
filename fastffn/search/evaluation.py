"""How a search stage judges a candidate: `evaluate(genes)` for a `Study`, built from the recipe.

    trained     the candidate takes its slices of the supernet, goes through the distillation stages
                of `train`, and is judged after each of the `rungs` of the last one
    one-shot    without `train`: the supernet runs the candidate's genes as it is; what consecutive
                candidates have in common is computed once (`oneshot`)

Whatever does not depend on the candidate is done once: data are token ids, the teacher's outputs
come from a cache where the stage asks for one, all candidates see the same batches in the same
order, and share the memory of what they do not train. On a GPU their functions are interpreted: to
compile each would take longer than to judge it.

Why not the engine's trainer: a candidate lives for seconds and is judged in between, so it needs
neither checkpoints nor logs, and building a Trainer takes as long as its first steps.
"""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastffn.distill.batches import LengthSampler
from fastffn.distill.outputs import model_fingerprint
from fastffn.distill.preparation import Prepared, prepare, stage_seed
from fastffn.distill.recipe import Recipe
from fastffn.distill.recipe_parts import ModelSpec, Stage
from fastffn.distill.stage_module import StageModule
from fastffn.distill.stages import freeze
from fastffn.distill.subnetworks import kept_layers
from fastffn.distill.teaching import Taught, cached, runner
from fastffn.errors import UserError
from fastffn.evaluate.size import count
from fastffn.expr import Cost, Gene, gene_cost
from fastffn.memory import free_bytes
from fastffn.models import extract
from fastffn.ops import backend
from fastffn.search.oneshot import SharedPrefixes
from fastffn.search.recipe import SearchRecipe, SearchStage
from fastffn.search.scoring import Around, LossScore, TaskScore, nothing

_SHARE = 4  # part of the free memory that states of common layers may take: one in so many
SUPERNET, CANDIDATE = "supernet", "candidate"
Progress = Callable[[str, float, float, str], None]


def distillation(
    recipe: SearchRecipe, names: Sequence[str], supernet: Path | None = None
) -> Recipe:
    """The distillation recipe with the stages of these names alone, in the recipe's order.

    Args:
        supernet: where the supernet is loaded from; None: as the recipe says.
    """
    distil = recipe.distil
    models = dict(distil.models)
    if supernet is not None:
        models[SUPERNET] = ModelSpec(load=str(supernet))
    apart: dict[str, int] = {}
    for stage in recipe.search:
        name = scored_data(recipe, stage)
        apart[name] = max(apart.get(name, 0), stage.score.rows)
    data = {
        name: dataclasses.replace(spec, hold_out=apart[name]) if name in apart else spec
        for name, spec in distil.data.items()
    }
    stages = tuple(stage for stage in distil.stages if stage.name in names)
    return dataclasses.replace(distil, models=models, data=data, stages=stages)


def scored_data(recipe: SearchRecipe, stage: SearchStage) -> str:
    """Name of the data whose held-out rows judge the stage's candidates."""
    if stage.score.metric != "loss":
        return stage.score.data
    return next(s.data for s in recipe.distil.stages if s.name == stage.score.stage)


def evaluation(
    recipe: SearchRecipe,
    stage: SearchStage,
    supernet: Path | None,
    work: Path,
    device: torch.device,
    progress: Progress | None = None,
) -> "Trained | OneShot":
    """What judges the candidates of a search stage.

    Args:
        supernet: folder of its weights; None: it is as the recipe says.
        work: where caches of teachers' outputs are, or come to be.

    Raises:
        UserError: models, data and losses that do not fit, or a score that nothing is trained for.
    """
    names = used(recipe, stage)
    made = prepare(distillation(recipe, names, supernet), progress or (lambda *_: None))
    for model in made.models.values():
        model.to(device).eval().requires_grad_(False)
    return (Trained if stage.train else OneShot)(made, stage, work, device, progress)


def used(recipe: SearchRecipe, stage: SearchStage) -> set[str]:
    """Names of the distillation stages whose models, data and losses a search stage needs.

    Raises:
        UserError: none of them has the data that the stage is scored on.
    """
    names = {*stage.train, *([stage.score.stage] if stage.score.stage else [])}
    if not names:  # the supernet's own training says what head and data it has
        until = recipe.search[: recipe.search.index(stage) + 1]
        names = {*next((before.supernet for before in reversed(until) if before.supernet), ())}
    on = {each.name for each in recipe.distil.stages if each.data == scored_data(recipe, stage)}
    names = names or on
    if not names & on:
        raise UserError(
            f"search.{stage.name}.score: nothing that the stage trains or trained the supernet for "
            f"it has the data {stage.score.data}, so the model has no head for them: name other "
            "data, or train on these"
        )
    return names


def check_score(stage: SearchStage, module: StageModule) -> None:
    """Refuses a loss that nothing prepares candidates for.

    Args:
        module: of the distillation stage that scores.

    Raises:
        UserError: it has projections that are random.
    """
    score = stage.score.stage
    trained = stage.train and stage.train[-1] == score
    if not trained and any(True for _ in module.terms.parameters()):
        raise UserError(
            f"search.{stage.name}: the losses of {score} project hidden states, and nothing trains "
            "the projections: score by relations, logits or a metric"
        )


def fingerprint(made: Prepared) -> str:
    """Of the models' weights and of the data, wherever they lie."""
    models = (f"{name} {model_fingerprint(made.models[name])}" for name in sorted(made.origins))
    data = (f"{name} {made.data[name].fingerprint}" for name in sorted(made.data))
    return hashlib.sha256(" ".join((*models, *data)).encode()).hexdigest()


class _Evaluation:
    """What both ways share: models, data, the score."""

    def __init__(
        self,
        made: Prepared,
        stage: SearchStage,
        work: Path,
        device: torch.device,
        progress: Progress | None = None,
    ):
        self.made, self.stage, self.work, self.device = made, stage, work, device
        self.progress = progress or (lambda *_: None)
        self.supernet = made.models[SUPERNET]
        self.stages = {s.name: (number, s) for number, s in enumerate(made.recipe.enabled)}
        score = stage.score
        self._scored: Stage | None = None  # by whose losses
        if score.metric == "loss":
            _, scored = self.stages[score.stage]
            self._scored = scored
            module = self.module(scored, self.supernet)
            check_score(stage, module)
            data = made.data[scored.data]
            held = dataclasses.replace(data, train=data.held_out)
            taught = self.taught(scored, module, held.train, "held-out")
            weights = {name: scored.losses[name].weight for name in module.counted}
            self._loss = LossScore(data, taught, weights)
        else:
            self._metric = TaskScore(made.data[score.data], score.metric)

    def module(self, stage: Stage, model: nn.Module) -> StageModule:
        """A stage's losses around a model."""
        number, _ = self.stages[stage.name]
        (name,) = stage.student
        own, self.made.models[name] = self.made.models[name], model
        try:
            alone = dataclasses.replace(stage, subnetworks=None, depths=(), ratios=())
            return self.made.module(alone, number).to(self.device)
        finally:
            self.made.models[name] = own

    def taught(self, stage: Stage, module: StageModule, data, what: str) -> Taught | None:
        """What gives the teacher's outputs for rows of `data`."""
        if not module.teacher_reads:
            return None
        teacher = self.made.models[stage.teacher]
        if not stage.cache:
            return runner(teacher, module.teacher_reads)
        return cached(
            teacher,
            module.teacher_reads,
            data,
            self.work / f"outputs-{stage.name}-{what}",
            lambda done, total: self.progress(f"{self.stage.name}: teacher", done, total, ""),
        )

    def score(
        self, model: nn.Module, module: StageModule | None = None, around: Around = nothing
    ) -> float:
        """NaN where the weights are not finite."""
        if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
            return math.nan
        with self.computing():
            if self.stage.score.metric != "loss":
                return self._metric(model, around)
            return self._loss(module, around)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """In the recipe's precision, without compilation."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.made.recipe.precision)
        mixed = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        with mixed, backend.interpreted():
            yield


class OneShot(_Evaluation):
    """The supernet's own quality with a candidate's genes."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._module = None
        if self.stage.score.metric == "loss":
            self._module = self.module(self._scored, self.supernet)
        self._shared = SharedPrefixes(self.supernet, free_bytes(self.device) // _SHARE)

    def __call__(self, genes: Sequence[Gene]) -> float:
        self.supernet.set_genes(genes, layers_for(genes, self.supernet))
        with self._shared:
            return self.score(self.supernet, self._module, self._shared.batch)


class Trained(_Evaluation):
    """The quality of a candidate that goes on from the supernet's weights."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._trainings = []
        for name in self.stage.train:
            number, stage = self.stages[name]
            module = self.module(stage, self.supernet)
            rows = self.made.data[stage.data].train
            taught = self.taught(stage, module, rows, "train")
            self._trainings.append((stage, taught, stage_seed(self.made.recipe, number)))
        self._untrained = self._never_trained()

    def __call__(self, genes: Sequence[Gene]) -> Iterator[float]:
        """Yields the quality after each rung."""
        candidate = self.cut(genes)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for place, (stage, taught, seed) in enumerate(self._trainings):
                last = place == len(self._trainings) - 1
                torch.manual_seed(seed)
                module = self.module(stage, candidate)
                steps = self.made.steps(stage)
                rungs = {max(1, round(part * steps)) for part in self.stage.rungs} if last else ()
                judging = module
                if self._scored is not None and self._scored.name != stage.name:
                    judging = self.module(self._scored, candidate)
                for done in self._train(module, stage, taught, seed, steps):
                    if done in rungs:
                        yield self.score(candidate, judging)

    def cut(self, genes: Sequence[Gene]) -> nn.Module:
        """The candidate with the supernet's weights."""
        layers = layers_for(genes, self.supernet)
        return extract(self.supernet, genes, layers, self._untrained)

    def _never_trained(self) -> set[str]:
        """Names of the parameters of a candidate that none of the stages trains."""
        genes = self.supernet.config.parsed_genes()
        probe = extract(self.supernet, genes)
        names = {name for name, _ in probe.named_parameters()}
        for stage, _, _ in self._trainings:
            freeze(probe, stage)
            names -= {name for name, p in probe.named_parameters() if p.requires_grad}
        return names

    def _train(
        self, module: StageModule, stage: Stage, taught: Taught | None, seed: int, steps: int
    ) -> Iterator[int]:
        """Trains step by step; yields the number of those done after each."""
        from transformers import get_scheduler

        (candidate,) = module.students.values()
        freeze(candidate, stage)
        module.terms.requires_grad_(True)
        parameters = [p for p in module.parameters() if p.requires_grad]
        decayed = [p for p in parameters if p.dim() > 1]
        rest = [p for p in parameters if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": stage.weight_decay}]
        groups += [{"params": rest, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(
            groups, stage.learning_rate, betas=stage.betas, eps=stage.eps, fused=True
        )
        warmup = stage.warmup_steps
        warmup = round(stage.warmup * steps) if warmup is None else warmup
        schedule = get_scheduler(stage.schedule, optimiser, warmup, steps)
        scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.made.recipe.precision == "fp16"
        )
        weights = {name: stage.losses[name].weight for name in module.counted}
        data = self.made.data[stage.data].train
        batches = _batches(data.lengths, stage.batch_size, seed)
        for step in range(steps):
            module.train()
            numbers = next(batches)
            batch = data.batch(numbers)
            batch.pop("index")
            batch = {name: value.to(self.device) for name, value in batch.items()}
            theirs = taught(batch, numbers) if taught else {}
            with self.computing():
                losses = module(batch, theirs, step)
            total = sum(weights[name] * value for name, value in losses.items())
            scaler.scale(total).backward()
            scaler.unscale_(optimiser)
            torch.nn.utils.clip_grad_norm_(parameters, stage.max_grad_norm)
            scaler.step(optimiser)
            scaler.update()
            schedule.step()
            optimiser.zero_grad()
            yield step + 1


def _batches(lengths: np.ndarray, size: int, seed: int) -> Iterator[list[int]]:
    """Row numbers of one batch after another, epoch after epoch."""
    sampler = LengthSampler(lengths, size, seed=seed, whole=True)
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        order = list(sampler)
        yield from (order[k : k + size] for k in range(0, len(order), size))
        epoch += 1


def layers_for(genes: Sequence[object], supernet: nn.Module) -> list[int] | None:
    """Which of the supernet's layers a candidate of so many genes has; None: all."""
    count = supernet.config.num_hidden_layers
    return None if len(genes) == count else kept_layers(len(genes), count)


def rest_of(supernet: nn.Module, depth: int, length: int = 128) -> tuple[int, int]:
    """What an EfficientBERT encoder has besides its FFNs: parameters, and MACs per token.

    Args:
        supernet: with or without a head, which does not count.
        depth: number of its layers that count.
        length: tokens of the text that attention's share is counted for.
    """
    base = supernet.base_model
    genes = base.config.parsed_genes()[:depth]
    model = extract(base, genes, layers_for(genes, base))
    config = model.config
    length = min(length, config.max_position_embeddings)
    found = count(model, length)
    ffns = sum((gene_cost(gene, config.hidden_size) for gene in genes), Cost())
    return found["params"] - ffns.params, found["macs"] // length - ffns.macs
