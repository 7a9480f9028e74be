"""Trains one stage of a recipe, or takes its result from the run directory."""

import contextlib
import importlib.util
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from fastffn.distill.checkpoints import damage, seal, writing
from fastffn.distill.preparation import Prepared, origins, stage_seed
from fastffn.distill.processes import Processes
from fastffn.distill.recipe import Stage
from fastffn.distill.resumable import CURVE_POINTS, Clock, one_device
from fastffn.distill.stage_module import StageModule
from fastffn.distill.stage_trainer import StageTrainer
from fastffn.distill.teaching import cached, runner
from fastffn.errors import UserError
from fastffn.evaluate.tasks import evaluate
from fastffn.files import write_text_atomic
from fastffn.models.architectures import parameter_names
from fastffn.rundir import atomic_directory

logger = logging.getLogger(__name__)

_PROBE = 3  # examples of the batch that tells which parameters the losses reach
_WEIGHTS = "module.safetensors"
Progress = Callable[[str, float, float, str], None]


@dataclass
class StageRun:
    """One stage in its run directory.

    Attributes:
        number: its place among the enabled stages, from 0.
        folder: of its results: weights, projections too, and log.json.
        work: of its checkpoints and of the teacher's outputs.
        helpers: state of the projections of earlier stages: (student, loss) -> state dict.
    """

    made: Prepared
    stage: Stage
    number: int
    folder: Path
    work: Path
    processes: Processes
    helpers: dict[tuple[str, str], dict[str, Tensor]]

    def module(self) -> StageModule:
        """The students, and projections as they are when the stage starts."""
        module = self.made.module(self.stage, self.number)
        for student, terms in module.terms.items() if self.stage.projections == "keep" else ():
            for loss, term in terms.items():
                line = (student, *origins(self.made.recipe, student))
                kept = next((h for name in line if (h := self.helpers.get((name, loss)))), {})
                own = term.state_dict()
                if kept and {k: v.shape for k, v in kept.items()} == {
                    k: v.shape for k, v in own.items()
                }:
                    term.load_state_dict(kept)
        return module

    def check(self) -> None:
        """Refuses what would go wrong once it trains: runs a step of a few examples, on the CPU.

        Raises:
            UserError: the first thing that does not fit.
        """
        stage, data = self.stage, self.made.data[self.stage.data]
        pieces = self.processes.count * stage.accumulate
        if stage.batch_size % pieces:
            raise UserError(
                f"stages.{stage.name}.batch_size {stage.batch_size} does not divide into "
                f"{self.processes.count} processes x {stage.accumulate} pieces: choose a multiple "
                f"of {pieces}"
            )
        if pieces > 1 and len(data.train) < stage.batch_size:
            raise UserError(
                f"stages.{stage.name}.batch_size {stage.batch_size} is more than the "
                f"{len(data.train)} rows of {stage.data}, which cannot be shared out: make it "
                "smaller"
            )
        module = self.module()
        reads = module.teacher_reads
        teacher = runner(self.made.models[stage.teacher], reads) if reads else None
        students = module.students.values() if module.sandwich else ()
        genes = [list(student.config.genes) for student in students]
        with self._trainable(module, teacher):
            pass
        for student, before in zip(students, genes, strict=True):
            student.set_genes(before)  # an earlier stage may train it first

    def bytes(self) -> int:
        """Of the students' weights."""
        models = (self.made.models[name] for name in self.stage.student)
        return sum(4 * p.numel() for model in models for p in model.parameters())

    def damage(self) -> str:
        """What is wrong with the finished stage's files, in a few words; "": nothing."""
        return damage(self.folder)

    def clean(self) -> None:
        """Removes the checkpoints of the finished stage."""
        if self.processes.first:
            shutil.rmtree(self.work, ignore_errors=True)

    def restore(self) -> None:
        """Gives students and projections the state in which the finished stage left them."""
        module = self.module()
        load_model(module, str(self.folder / _WEIGHTS))
        self._keep(module)

    def train(self, progress: Progress) -> dict[str, Any]:
        """Trains, saves, judges; returns what the report says of the stage."""
        stage, made = self.stage, self.made
        data, steps = made.data[stage.data], made.steps(stage)
        module = self.module()
        device = self.processes.device
        module.to(device)
        start = time.monotonic()
        teacher = self._teacher(module, progress)
        beforehand = time.monotonic() - start if stage.cache else 0.0
        arguments = self._arguments(steps)
        clock = Clock(made.recipe.checkpoint_seconds, None)
        with self._trainable(module, teacher) as frozen:
            trainer = StageTrainer(
                module,
                arguments,
                clock,
                teacher=teacher,
                data=data.train,
                weights=self._weights(module),
                stage=stage.name,
            )
            for callback in self._callbacks(progress):
                trainer.add_callback(callback)
            trainer.run(self.work)
        module.eval().to("cpu")
        if stage.teacher is not None:
            made.models[stage.teacher].to("cpu")
        self._keep(module)
        if self.processes.first:
            with writing(self.folder), atomic_directory(self.folder) as folder:
                save_model(module, str(folder / _WEIGHTS), metadata={"format": "pt"})
                _write_log(folder, trainer)
                seal(folder)
        self.processes.wait()
        parts = {"cached outputs": beforehand} if stage.cache else {}
        parts |= trainer.seconds
        return {
            "steps": steps,
            "seconds": round(beforehand + clock.seconds(), 2),
            "seconds_by_part": {part: round(seconds, 2) for part, seconds in parts.items()},
            "examples": len(data.train),
            "frozen": frozen,
            "curve": trainer.curve(),
            "metrics": self.judge(),
        }

    def judge(self) -> dict[str, dict[str, float]]:
        """student -> metric -> value on the task's validation split; empty for text."""
        data = self.made.data[self.stage.data]
        if data.task is None or not self._heads_trained():
            return {}
        found = {}
        for name in self.stage.student:
            model = self.made.models[name].to(self.processes.device)
            metrics = evaluate(model, data.validation, data.task, "validation")
            found[name] = {metric: round(value, 6) for metric, value in metrics.items()}
            model.to("cpu")
        return found

    # -- the parts of a training -----------------------------------------------------------------

    def _heads_trained(self) -> bool:
        """Whether a stage so far has taught the head: else its answers are chance."""
        stages = self.made.recipe.enabled[: self.number + 1]
        return any(
            loss.options.needs_labels
            for stage in stages
            if set(stage.student) & set(self.stage.student)
            for loss in stage.losses.values()
        )

    def _weights(self, module: StageModule) -> dict[str, float]:
        return {name: self.stage.losses[name.rpartition("/")[2]].weight for name in module.counted}

    def _keep(self, module: StageModule) -> None:
        """What later stages need beside the students; a supernet is left at its largest."""
        if module.sandwich is not None:
            (supernet,) = module.students.values()
            supernet.set_genes(*module.sandwich.largest)
        for student, terms in module.terms.items():
            for loss, term in terms.items():
                self.helpers[student, loss] = {k: v.clone() for k, v in term.state_dict().items()}

    def _teacher(self, module: StageModule, progress: Progress):
        """What gives the teacher's outputs for a batch; None where no loss reads any."""
        stage = self.stage
        if stage.teacher is None:
            return None
        model = self.made.models[stage.teacher].to(self.processes.device)
        model.eval().requires_grad_(False)
        if not module.teacher_reads:
            return None
        if not stage.cache:
            return runner(model, module.teacher_reads)
        taught = cached(
            model,
            module.teacher_reads,
            self.made.data[stage.data].train,
            self.work.parent / f"outputs-{stage.teacher}-{stage.data}",
            lambda done, total: progress(f"{stage.name}: teacher", done, total, ""),
        )
        if stage.replacing is None:
            model.to("cpu")
        return taught

    def _arguments(self, steps: int) -> TrainingArguments:
        stage, recipe = self.stage, self.made.recipe
        pieces = self.processes.count * stage.accumulate
        warmup = stage.warmup_steps
        warmup = round(stage.warmup * steps) if warmup is None else warmup
        arguments = TrainingArguments(
            output_dir=str(self.work),
            max_steps=steps,
            per_device_train_batch_size=stage.batch_size // pieces,
            gradient_accumulation_steps=stage.accumulate,
            learning_rate=stage.learning_rate,
            lr_scheduler_type=stage.schedule,
            warmup_steps=warmup,
            weight_decay=stage.weight_decay,
            adam_beta1=stage.betas[0],
            adam_beta2=stage.betas[1],
            adam_epsilon=stage.eps,
            max_grad_norm=stage.max_grad_norm,
            optim="adamw_torch_fused",
            bf16=recipe.precision == "bf16",
            fp16=recipe.precision == "fp16",
            logging_strategy="steps",
            logging_steps=max(1, steps // CURVE_POINTS),
            logging_nan_inf_filter=False,
            save_strategy="no",  # `Clock` asks for checkpoints
            save_total_limit=2,
            seed=stage_seed(recipe, self.number),
            remove_unused_columns=False,
            dataloader_pin_memory=self.processes.device.type == "cuda",
            ddp_find_unused_parameters=False,
            use_cpu=self.processes.device.type == "cpu",
            disable_tqdm=True,
            report_to="none",
        )
        return one_device(arguments)

    def _callbacks(self, progress: Progress) -> list[TrainerCallback]:
        if not self.processes.first:
            return []
        callbacks: list[TrainerCallback] = [_Telling(self.stage.name, progress)]
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
            from transformers.integrations import TensorBoardCallback

            board = self.folder.parents[1] / "tensorboard" / self.folder.name
            callbacks.append(TensorBoardCallback(SummaryWriter(str(board))))
        return callbacks

    @contextlib.contextmanager
    def _trainable(self, module: StageModule, teacher) -> Iterator[list[str]]:
        """Freezes what the recipe says and what no loss reaches; yields the names of the latter.

        Processes that train together would wait for gradients that never come.
        """
        stage = self.stage
        everything = {
            name: parameter for name, parameter in module.named_parameters(remove_duplicate=True)
        }
        for parameter in everything.values():
            parameter.requires_grad_(True)
        for student in module.students.values():
            freeze(student, stage)
        unreached = self._unreached(module, teacher)
        for name in unreached:
            everything[name].requires_grad_(False)
        names = [name.removeprefix("students.") for name in unreached]
        if names:
            logger.info("not reached by the losses, frozen: %s", ", ".join(names))
        try:
            yield names
        finally:
            for parameter in everything.values():
                parameter.requires_grad_(True)

    def _unreached(self, module: StageModule, teacher) -> list[str]:
        """Names of the trainable parameters that get no gradient; autograd is asked."""
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trained:
            raise UserError(f"stages.{self.stage.name}: nothing is left to train: freeze less")
        data = self.made.data[self.stage.data].train
        numbers = list(range(min(_PROBE, len(data))))
        batch = data.batch(numbers)
        batch.pop("index", None)
        device = next(iter(trained.values())).device
        batch = {name: value.to(device) for name, value in batch.items()}
        theirs = teacher(batch, numbers) if teacher else {}
        total = sum(module(batch, theirs, 0).values())
        gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        module.watch.seconds()  # the probe is no step
        return [name for name, grad in zip(trained, gradients, strict=True) if grad is None]


def freeze(student: nn.Module, stage: Stage) -> None:
    """Lets those parameters have gradients that the stage trains.

    Raises:
        UserError: a name in `freeze` or `train` that no parameter has.
    """
    called = parameter_names(student)
    for prefix in (*stage.freeze, *stage.train):
        if not any(name.startswith(prefix) for names in called.values() for name in names):
            raise UserError(
                f"stages.{stage.name}: no parameter's name starts with {prefix!r}: use "
                "layers, embeddings, head, or names like " + ", ".join(list(called)[:3])
            )
    for name, parameter in student.named_parameters():
        names = called[name]
        chosen = not stage.train or any(n.startswith(stage.train) for n in names)
        frozen = any(n.startswith(stage.freeze) for n in names)
        parameter.requires_grad_(chosen and not frozen)


class _Telling(TrainerCallback):
    """Progress after each step, with the loss of the last point of the curve."""

    # Without the trainer, which holds its callbacks: the circle would keep Adam's state alive.
    def __init__(self, stage: str, progress: Progress):
        self.stage, self.progress = stage, progress
        self.loss = ""

    def on_step_end(self, args, state, control, **kwargs):
        self.progress(self.stage, state.global_step, state.max_steps, self.loss)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.loss = f"loss {logs['loss']:.4g}"


def _write_log(folder: Path, trainer: StageTrainer) -> None:
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    write_text_atomic(folder / "log.json", json.dumps(entries, indent=1) + "\n")
