"""Models x runtimes x precisions, over workloads and threads: one report.

    prepare models and files -> for each number of threads: load -> for each workload: check, race
                             -> memory of each contender

Contenders of a workload race together, whatever their precision: best against best needs them in
one run. Who cannot run, or disagrees with eager torch, is left out with the reason, and the rest
goes on.

The report is plain JSON:

    {"conditions": {"device", "isa", "versions", "date"},
     "models": [{"name", "origin", "positions", "params", "params_without_word_embeddings"}],
     "cells": [{"workload", "batch_size", "length", "texts", "tokens", "padding", "threads",
                "results": [{"model", "runtime", "precision", "ms", "low", "high", "first_ms",
                             "rounds", "engine", "disagreement"}]}],
     "refused": [{"model", "runtime", "precision", "why", "where"}],
     "memory": [{"model", "runtime", "precision", "resident", "peak", "disk"}]}

"ms" is of all batches of the workload; "tokens" are real ones, of the model named first, as are
"padding" and "length". The runtime "products" is the bare products of a model (`products.py`).
"""

import contextlib
import dataclasses
import datetime
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..memory import freed_memory_kept
from . import footprint, race
from .contenders import PRECISIONS, RUNTIMES, Batch, Files, Runner, Setting, Unavailable
from .products import Products, shapes
from .subjects import Subject, load_encoder, prepare, read_tokenizer
from .workloads import Workload, padding

PRODUCTS = "products"
_PEERS = ("onnxruntime", "openvino", "ctranslate2")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Progress = Callable[[str], None]


@dataclass
class Options:
    """What to compare.

    Attributes:
        models: as `subjects.prepare` takes them; the first is what others are related to.
        workloads: see `workloads`.
        threads: numbers of threads, each a sweep of its own.
        runtimes, precisions: by name; None: all that run on the device.
        seconds, least, most: of a cell's race: about how long, and how many rounds.
        device: "cpu" or "cuda".
        memory: whether to measure that too, on the largest workload.
        tokenizer: for models that came without one: a folder or hub name.
    """

    models: Sequence[str]
    workloads: Sequence[Workload]
    threads: Sequence[int]
    runtimes: Sequence[str] | None = None
    precisions: Sequence[str] = PRECISIONS
    seconds: float = 10.0
    least: int = 5
    most: int = 50
    device: str = "cpu"
    memory: bool = True
    tokenizer: str | None = None

    def check(self) -> None:
        """Raises a UserError that names what cannot be compared."""
        for what, given, known in (
            ("runtimes", self.runtimes or (), tuple(RUNTIMES)),
            ("precisions", self.precisions, PRECISIONS),
        ):
            if unknown := [name for name in given if name not in known]:
                raise UserError(f"{what}: {unknown[0]} is unknown: choose {', '.join(known)}")
        if not (self.models and self.workloads and self.threads):
            raise UserError("nothing to compare: give models, batch sizes and threads")
        if any(count < 1 for count in self.threads):
            raise UserError(f"threads {min(self.threads)}: give at least 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device cuda: torch finds no CUDA device here")


class Entrant(NamedTuple):
    """A contender by name."""

    model: str
    runtime: str
    precision: str

    def facts(self) -> dict[str, str]:
        return self._asdict()


class Comparison:
    """One comparison; `run` does it all."""

    def __init__(
        self, options: Options, report: dict[str, Any], save: Callable, progress: Progress
    ):
        self.options, self.report, self.save, self.progress = options, report, save, progress
        for name in ("cells", "refused", "memory"):
            report.setdefault(name, [])
        self.subjects: dict[str, Subject] = {}
        self.files: dict[str, Files] = {}

    def run(self, folder: Path) -> None:
        """Races what the report does not have yet; `folder` takes the models' files."""
        for number, given in enumerate(self.options.models):
            place = folder / str(number)
            place.mkdir(parents=True)
            subject = prepare(given, place / "model")
            if subject.name in self.subjects:
                raise UserError(f"two models are called {subject.name}: name one NAME={given}")
            self.subjects[subject.name] = subject
            self.files[subject.name] = Files(subject, place)
            self.progress(f"{subject.name}: {subject.params:,} parameters, {subject.origin}")
        self._share_tokenizer()
        batches = {workload: self._batches(workload) for workload in self.options.workloads}
        self.report["models"] = [subject.facts() for subject in self.subjects.values()]
        for threads in self.options.threads:
            left = [each for each in batches if not self._has(each, threads)]
            if left:
                self._sweep(Setting(threads, self.options.device), {w: batches[w] for w in left})
        if self.options.memory:
            self._memory(batches)

    def _share_tokenizer(self) -> None:
        """Gives models without a tokenizer the one that was asked for, or the first other's."""
        shared = next((s.tokenizer for s in self.subjects.values() if s.tokenizer), None)
        if self.options.tokenizer is not None:
            shared = read_tokenizer(self.options.tokenizer)
        for name, subject in self.subjects.items():
            if subject.tokenizer is None:
                self.subjects[name] = dataclasses.replace(subject, tokenizer=shared)

    def _batches(self, workload: Workload) -> dict[str, list[dict[str, Tensor]]]:
        device = self.options.device
        return {
            name: [
                {key: x.to(device) for key, x in batch.items()}
                for batch in workload.batches(subject)
            ]
            for name, subject in self.subjects.items()
        }

    def _has(self, workload: Workload, threads: int) -> bool:
        keys = {(cell["workload"], cell["threads"]) for cell in self.report["cells"]}
        return (workload.name, threads) in keys

    # -- one number of threads -------------------------------------------------------------------

    def _entrants(self) -> list[Entrant]:
        wanted, device = self.options.runtimes, self.options.device
        names = [
            name
            for name, runtime in RUNTIMES.items()
            if (device in runtime.devices if wanted is None else name in wanted)
        ]
        return [
            Entrant(model, runtime, precision)
            for precision in self.options.precisions
            for runtime in names
            for model in self.subjects
        ]

    def _sweep(self, setting: Setting, batches: dict) -> None:
        """All workloads at one number of threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(setting.threads)
        try:
            runners = {}
            for entrant in self._entrants():
                runner = self._load(entrant, setting)
                if runner is not None:
                    runners[entrant] = runner
            truths = _Truths(self.files, runners, setting)
            products = self._products(setting.device)
            for workload, own in batches.items():
                self._cell(workload, own, setting, runners, truths, products)
        finally:
            torch.set_num_threads(before)

    def _load(self, entrant: Entrant, setting: Setting) -> Runner | None:
        """A runner; None, and a line in the report, where there is none."""
        runtime, files = RUNTIMES[entrant.runtime], self.files[entrant.model]
        try:
            runtime.check(entrant.precision, setting.device)
            runtime.make(files, entrant.precision)
            return runtime.load(files, entrant.precision, setting)
        except Exception as error:
            self._refuse(entrant, error, "")
            return None

    def _refuse(self, entrant: Entrant, error: Exception, where: str) -> None:
        """Notes why a contender is left out; what is no `Unavailable` is its failure."""
        text = " ".join(str(error).split())[:300]
        if not isinstance(error, Unavailable):
            text = f"fails: {type(error).__name__}: {text}"
        row = {**entrant.facts(), "why": text, "where": where}
        if row not in self.report["refused"]:
            self.report["refused"].append(row)
            at = f" at {where}" if where else ""
            self.progress(f"without {' '.join(entrant)}{at}: {text}")

    def _products(self, device: str) -> dict[Entrant, Products]:
        found = {}
        for name, files in self.files.items():
            noted = shapes(load_encoder(files.model()))
            for precision, dtype in _DTYPES.items():
                if precision in self.options.precisions:
                    found[Entrant(name, PRODUCTS, precision)] = Products(noted, dtype, device)
        return found

    # -- one workload ----------------------------------------------------------------------------

    def _cell(self, workload, batches, setting, runners, truths, products) -> None:
        """Checks the contenders, races those that agree, and adds what was found."""
        checked = self._checked(workload, batches, runners, truths)
        passes: dict[Entrant, Callable[[], object]] = {
            entrant: _pass(runners[entrant], batches[entrant.model]) for entrant in checked
        }
        for entrant, run in products.items():
            counts = [int(batch["attention_mask"].sum()) for batch in batches[entrant.model]]
            passes[entrant] = _each(run, counts)
            passes[entrant]()
        options = self.options
        with torch.inference_mode():
            times = race.race(passes, options.seconds, options.least, options.most, setting.device)
        results = []
        for entrant, rounds in times.items():
            first, far = checked.get(entrant, (0.0, None))
            row = {**entrant.facts(), **race.Timing(first, rounds).summary()}
            if entrant in runners and runners[entrant].engine:
                row["engine"] = runners[entrant].engine
            results.append(row if far is None else {**row, "disagreement": float(f"{far:.3g}")})
        own = next(iter(batches.values()))
        self.report["cells"].append(
            {
                "workload": workload.name,
                "batch_size": workload.batch_size,
                "length": workload.length,
                "texts": sum(len(batch["input_ids"]) for batch in own),
                "tokens": sum(int(batch["attention_mask"].sum()) for batch in own),
                "padding": round(padding(own), 4),
                "threads": setting.threads,
                "results": results,
            }
        )
        self.save(self.report)
        shown = ", ".join(f"{' '.join(Entrant(**_names(r)))} {r['ms']:.4g}" for r in results)
        self.progress(f"{workload.name}, {setting.threads} threads, ms: {shown}")

    def _checked(self, workload, batches, runners, truths) -> dict[Entrant, tuple[float, float]]:
        """First call's seconds and disagreement of each contender that may race."""
        torch.compiler.reset()  # graphs of earlier shapes are in the way of those to come
        expected = {name: truths.hidden(name, own) for name, own in batches.items()}
        lost = {}
        if "bf16" in self.options.precisions:
            lost = {name: truths.lost(name, batches[name], expected[name]) for name in batches}
        found = {}
        for entrant, runner in runners.items():
            own = batches[entrant.model]
            allowed = race.limit(entrant.precision, lost.get(entrant.model, 0.0))
            try:
                first = race.timed(_begun(runner, own), 1, self.options.device)
                far = _farthest(runner, own, expected[entrant.model])
                if far > allowed:
                    raise Unavailable(f"disagrees with eager torch: {far:.2g}, above {allowed:.2g}")
            except Exception as error:
                self._refuse(entrant, error, workload.name)
            else:
                found[entrant] = (first, far)
        return found

    # -- memory ----------------------------------------------------------------------------------

    def _memory(self, batches: dict) -> None:
        """Of every contender that has run, on the workload with the most places."""
        workload = max(batches, key=lambda w: w.batch_size * (w.length or 1))
        setting = Setting(self.options.threads[0], self.options.device)
        rows = [row for cell in self.report["cells"] for row in cell["results"]]
        ran = dict.fromkeys(Entrant(**_names(row)) for row in rows if row["runtime"] != PRODUCTS)
        measured = {Entrant(**_names(row)) for row in self.report["memory"]}
        for entrant in (each for each in ran if each not in measured):
            files = self.files[entrant.model]
            own = [
                {key: x.cpu() for key, x in batch.items()}
                for batch in batches[workload][entrant.model][:1]
            ]
            try:
                RUNTIMES[entrant.runtime].make(files, entrant.precision)
                found = footprint.measure(files, entrant.runtime, entrant.precision, setting, own)
            except Unavailable as error:
                self._refuse(entrant, error, "memory")
                continue
            self.report["memory"].append({**entrant.facts(), "workload": workload.name, **found})
            self.save(self.report)
            self.progress(f"{' '.join(entrant)}: {found['resident']:.0f} MiB after {workload.name}")


def run(
    options: Options,
    report: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda report: None,
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Compares; see the module.

    Args:
        report: of an earlier run with the same options, whose cells are kept.
        save: is given the report after each cell.
        progress: is given lines to show.

    Raises:
        UserError: options or models that cannot be compared.
    """
    report = {} if report is None else report
    options.check()
    report.setdefault("conditions", conditions(options.device))
    # Eager torch would pay for pages that its own frees gave back; a server's allocator keeps them.
    with tempfile.TemporaryDirectory(prefix="fastffn-bench-") as folder, freed_memory_kept():
        Comparison(options, report, save, progress).run(Path(folder))
    return report


def conditions(device: str) -> dict[str, Any]:
    """Device, versions and date, for reports."""
    from .. import doctor

    found = doctor.report()
    cpu = f"{found['cpu']}, {found['cores']} cores"
    versions = {}
    for name in ("fastffn", "torch", "transformers", *_PEERS):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "device": f"{torch.cuda.get_device_name()}; {cpu}" if device == "cuda" else cpu,
        "isa": found["extension"]["isa"],
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def _names(row: dict[str, Any]) -> dict[str, str]:
    return {name: row[name] for name in Entrant._fields}


def _pass(runner: Runner, batches: Sequence[Batch]) -> Callable[[], object]:
    def run() -> None:
        for batch in batches:
            runner(batch)

    return run


def _each(products: Products, counts: Sequence[int]) -> Callable[[], object]:
    def run() -> None:
        for count in counts:
            products(count)

    return run


def _begun(runner: Runner, batches: Sequence[Batch]) -> Callable[[], object]:
    def run() -> None:
        runner.begin({tuple(batch["input_ids"].shape) for batch in batches})
        with torch.inference_mode():
            for batch in batches:
                runner(batch)

    return run


def _farthest(runner: Runner, batches: Sequence[Batch], truths: Sequence[Tensor]) -> float:
    with torch.inference_mode():
        return max(
            race.disagreement(runner(batch), truth, batch)
            for batch, truth in zip(batches, truths, strict=True)
        )


class _Truths:
    """Eager torch, of each model: what others are compared to, and what bf16 loses there."""

    def __init__(self, files: dict[str, Files], runners: dict[Entrant, Runner], setting: Setting):
        self.files, self.setting = files, setting
        self.loaded = {key: each for key, each in runners.items() if key.runtime == "eager"}

    def _eager(self, model: str, precision: str) -> Runner:
        key = Entrant(model, "eager", precision)
        if key not in self.loaded:
            found = RUNTIMES[key.runtime].load(self.files[model], precision, self.setting)
            self.loaded[key] = found
        return self.loaded[key]

    def hidden(self, model: str, batches: Sequence[Batch]) -> list[Tensor]:
        runner = self._eager(model, "fp32")
        with torch.inference_mode():
            return [runner(batch).clone() for batch in batches]

    def lost(self, model: str, batches: Sequence[Batch], truths: Sequence[Tensor]) -> float:
        return _farthest(self._eager(model, "bf16"), batches, truths)
