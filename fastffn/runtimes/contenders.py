"""What runs an encoder, behind one call: torch, torch.compile, onnxruntime, openvino, ctranslate2,
fastffn.

    runtime.make(files, precision)              writes what it loads, once, into the model's folder
    runtime.load(files, precision, setting)     -> Runner
    runner.begin(shapes); runner(batch)         -> last hidden states [B, T, H]

Each rival runs as its users run it at its best: with the library's own graph optimisations, for the
number of threads that is asked for, tuned for latency, on buffers that are not copied, and, where
all batches have one shape (`begin`), specialised for that shape. Making and loading are apart,
because memory is measured in a process that only loads.

What does not exist, such as bf16 in onnxruntime on a CPU, is `Unavailable` with the reason, which
tables repeat: an empty cell should never look like a loss.
"""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..ops import backend
from .subjects import Subject, load_encoder

PRECISIONS = ("fp32", "bf16", "int8")
Batch = Mapping[str, Tensor]  # input_ids and attention_mask, int64 [B, T]
Shape = tuple[int, int]


class Unavailable(Exception):
    """This runtime cannot run this model so; the reason in one line."""


@dataclass(frozen=True)
class Setting:
    """Where runners run."""

    threads: int
    device: str = "cpu"


class Files:
    """The forms of one model on disk, each made when first asked for."""

    def __init__(self, subject: Subject, folder: Path):
        self.subject = subject
        self.folder = folder

    def model(self) -> Path:
        """In safetensors, as transformers saves it."""
        return self.subject.folder

    def onnx(self, quantize: str | None = None) -> Path:
        """As a graph of onnx: in float32, or with weights and activations in int8."""
        folder = self.folder / ("onnx-int8" if quantize else "onnx")
        if not folder.exists():
            from ..serve.export import export

            export(load_encoder(self.model()), folder, format="onnx", quantize=quantize)
        (file,) = folder.glob("*.onnx")
        return file

    def size(self, path: Path) -> int:
        """Bytes of a file with what lies beside it (weights apart from their graph), or folder."""
        folder = path if path.is_dir() else path.parent
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class Runner:
    """A loaded model: a batch on the setting's device -> last hidden states.

    Attributes:
        engine: what runs it, where the runtime has several.
    """

    def __init__(self, function: Callable[[Batch], Tensor], engine: str = ""):
        self._function = function
        self.engine = engine

    def begin(self, shapes: Iterable[Shape]) -> None:
        """Gets ready for batches of these shapes alone."""

    def __call__(self, batch: Batch) -> Tensor:
        return self._function(batch)


class Runtime:
    """One way to run an encoder.

    Attributes:
        name: as in tables and on the command line.
        why_not: precision -> the reason why it never runs in it.
        devices: where it runs.
        module: what has to be installed, from the extra `peers`; "" for nothing.
    """

    name = ""
    why_not: Mapping[str, str] = {}
    devices: tuple[str, ...] = ("cpu",)
    module = ""

    def check(self, precision: str, device: str) -> None:
        """Raises Unavailable where nothing needs to be tried."""
        if device not in self.devices:
            raise Unavailable(f"is run on {self.devices[0]} only")
        if precision in self.why_not:
            raise Unavailable(self.why_not[precision])
        if self.module and util.find_spec(self.module) is None:
            raise Unavailable(f'{self.module} is not installed: pip install "fastffn[peers]"')

    def make(self, files: Files, precision: str) -> Path:
        """The file or folder that `load` reads."""
        return files.model()

    def load(self, files: Files, precision: str, setting: Setting) -> Runner:
        raise NotImplementedError


# -- torch ---------------------------------------------------------------------------------------


def _hidden(output: Any) -> Tensor:
    return output.last_hidden_state


def _torch_model(files: Files, precision: str, setting: Setting) -> nn.Module:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return load_encoder(files.model()).to(setting.device, dtype)


class Eager(Runtime):
    """torch's own operations, one after the other: of EfficientBERT the plain torch form."""

    name = "eager"
    why_not = {"int8": "torch has no int8 of its own any more (torchao has)"}
    devices = ("cpu", "cuda")

    def load(self, files: Files, precision: str, setting: Setting) -> Runner:
        model = _torch_model(files, precision, setting)

        def run(batch: Batch) -> Tensor:
            with backend.portable():
                return _hidden(model(**batch))

        return Runner(run)


class _Compiled(Runner):
    """Compiled anew for each set of shapes; one shape alone as a static one."""

    def __init__(self, model: nn.Module, mode: str | None):
        super().__init__(self._run)
        self.model, self.mode = model, mode

    def begin(self, shapes: Iterable[Shape]) -> None:
        options: dict[str, Any] = {"dynamic": len(set(shapes)) > 1, "mode": self.mode}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            options["isolate_recompiles"] = True  # else several models share one limit of graphs

        def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return _hidden(self.model(input_ids=input_ids, attention_mask=attention_mask))

        self.compiled = torch.compile(forward, **options)

    def _run(self, batch: Batch) -> Tensor:
        with backend.portable():
            return self.compiled(batch["input_ids"], batch["attention_mask"])


class Compile(Runtime):
    """torch.compile of the plain torch form."""

    name = "compile"
    why_not = Eager.why_not
    devices = ("cpu", "cuda")
    mode: str | None = None

    def load(self, files: Files, precision: str, setting: Setting) -> Runner:
        return _Compiled(_torch_model(files, precision, setting), self.mode)


class CompileGraphs(Compile):
    """torch.compile with CUDA graphs: the usual choice for small batches on a GPU."""

    name = "compile-graphs"
    devices = ("cuda",)
    mode = "reduce-overhead"


class FastFFN(Runtime):
    """`fastffn.optimize`."""

    name = "fastffn"
    devices = ("cpu", "cuda")

    def load(self, files: Files, precision: str, setting: Setting) -> Runner:
        from ..serve.optimize import optimize

        model = load_encoder(files.model()).to(setting.device)
        options = {"bf16": {"dtype": torch.bfloat16}, "int8": {"quantize": "int8"}}
        try:
            optimized = optimize(model, **options.get(precision, {}))
        except UserError as error:
            raise Unavailable(str(error)) from error
        return Runner(lambda batch: _hidden(optimized(**batch)), optimized.report.engine)


# -- others --------------------------------------------------------------------------------------


class OnnxRuntime(Runtime):
    """onnxruntime's CPU provider with all graph optimisations; int8 is its dynamic quantisation."""

    name = "onnxruntime"
    why_not = {"bf16": "has no bf16 products on x86 CPUs"}
    module = "onnxruntime"

    def make(self, files: Files, precision: str) -> Path:
        return files.onnx("int8" if precision == "int8" else None)

    def load(self, files: Files, precision: str, setting: Setting) -> Runner:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = setting.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(self.make(files, precision)), options, providers=["CPUExecutionProvider"]
        )
        names = [each.name for each in session.get_inputs()]

        def run(batch: Batch) -> Tensor:
            (found,) = session.run(["last_hidden_state"], _arrays(batch, names))
            return torch.from_numpy(found)

        return Runner(run)


def _arrays(batch: Batch, names: Iterable[str]) -> dict[str, Any]:
    """What a graph takes, without copies; inputs beyond ids and mask are of zeros, as in torch."""
    given = {name: batch.get(name) for name in names}
    zeros = torch.zeros_like(batch["input_ids"])
    return {name: (zeros if x is None else x).numpy() for name, x in given.items()}


class _OpenVino(Runner):
    """Reshaped to a static graph where all batches have one shape."""

    def __init__(self, file: Path, precision: str, threads: int):
        import openvino

        super().__init__(self._run)
        self.core = openvino.Core()
        self.file = file
        hint = "bf16" if precision == "bf16" else "f32"  # int8 is in the graph
        self.settings = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }

    def begin(self, shapes: Iterable[Shape]) -> None:
        graph = self.core.read_model(self.file)
        self.names = [each.get_any_name() for each in graph.inputs]
        if len(each := list(set(shapes))) == 1:
            graph.reshape({name: list(each[0]) for name in self.names})
        compiled = self.core.compile_model(graph, "CPU", self.settings)
        self.request = compiled.create_infer_request()
        self.output = compiled.output("last_hidden_state")

    def _run(self, batch: Batch) -> Tensor:
        found = self.request.infer(
            _arrays(batch, self.names), share_inputs=True, share_outputs=True
        )
        return torch.from_numpy(found[self.output])


class OpenVino(Runtime):
    """openvino's CPU plugin, held to the precision that is asked for: by itself it takes bf16."""

    name = "openvino"
    module = "openvino"

    def make(self, files: Files, precision: str) -> Path:
        return files.onnx("int8" if precision == "int8" else None)

    def load(self, files: Files, precision: str, setting: Setting) -> Runner:
        return _OpenVino(self.make(files, precision), precision, setting.threads)


class CTranslate2(Runtime):
    """ctranslate2's encoder; plain architectures only, in its converter's list."""

    name = "ctranslate2"
    module = "ctranslate2"
    _TYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}

    def check(self, precision: str, device: str) -> None:
        super().check(precision, device)
        # Its OpenMP would spin for 0.2 s after a call, on cores that the next contender needs.
        os.environ.setdefault("KMP_BLOCKTIME", "1")
        import ctranslate2

        if self._TYPES[precision] not in ctranslate2.get_supported_compute_types("cpu"):
            raise Unavailable(f"has no {precision} on this CPU")

    def make(self, files: Files, precision: str) -> Path:
        from .ctranslate2_folder import convert

        folder = files.folder / f"ctranslate2-{precision}"
        if not folder.exists():
            convert(files.model(), folder, self._TYPES[precision])
        return folder

    def load(self, files: Files, precision: str, setting: Setting) -> Runner:
        import ctranslate2
        import numpy

        encoder = ctranslate2.Encoder(
            str(self.make(files, precision)),
            device="cpu",
            compute_type=self._TYPES[precision],
            intra_threads=setting.threads,
        )

        def run(batch: Batch) -> Tensor:
            ids = ctranslate2.StorageView.from_array(batch["input_ids"].int().numpy())
            lengths = batch["attention_mask"].sum(1, dtype=torch.int32)
            lengths = ctranslate2.StorageView.from_array(lengths.numpy())
            found = encoder.forward_batch(ids, lengths).last_hidden_state
            if precision == "bf16":
                found = found.to(ctranslate2.DataType.float32)
            return torch.from_numpy(numpy.array(found))

        return Runner(run)


RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        *(Eager(), Compile(), CompileGraphs(), OnnxRuntime()),
        *(OpenVino(), CTranslate2(), FastFFN()),
    )
}
OURS = FastFFN.name
