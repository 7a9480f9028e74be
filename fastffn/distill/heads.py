"""Task heads on encoders: which class carries one, and what its configuration says.

A head is named by the kind of task and its classes. The class that carries it is the one which
transformers' Auto classes know for the encoder's configuration, fastffn's own among them, so that
what is built here can be saved and loaded by anybody.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from fastffn.errors import UserError
from fastffn.models.architectures import Encoder, find, unwrapped

# kind -> the Auto class of transformers, problem_type in the configuration
_KINDS = {
    "none": ("AutoModel", None),
    "classification": ("AutoModelForSequenceClassification", "single_label_classification"),
    "regression": ("AutoModelForSequenceClassification", "regression"),
    "qa": ("AutoModelForQuestionAnswering", None),
    "tokens": ("AutoModelForTokenClassification", None),
}
_WITH_LABELS = ("classification", "tokens")
_OUTPUTS = {"regression": 1, "qa": 2}  # a score; the logits of start and end


@dataclass(frozen=True)
class Head:
    """What a model puts on top of its encoder.

    Attributes:
        kind: "none", "classification" or "regression" of a text or a pair, "qa" (a span of the
            text), "tokens" (a class for each token).
        labels: names of the classes in order, where there are classes.

    Raises:
        UserError: an unknown kind, classes that are missing, or given where there are none.
    """

    kind: str
    labels: tuple[str, ...] = ()

    def __post_init__(self):
        if self.kind not in _KINDS:
            raise UserError(f"head {self.kind!r} is unknown: choose one of {', '.join(_KINDS)}")
        if self.kind in _WITH_LABELS and len(self.labels) < 2:
            raise UserError(f"a head for {self.kind} needs two labels or more: name the classes")
        if self.kind not in _WITH_LABELS and self.labels:
            raise UserError(f"a head of kind {self.kind} has no labels: leave them out")

    @property
    def num_labels(self) -> int:
        """Outputs per text or token; 0 without a head."""
        return _OUTPUTS.get(self.kind, len(self.labels))

    def configured(self, config):
        """A copy of an encoder's configuration that says this head."""
        config = copy.deepcopy(config)
        if self.kind == "none":
            return config
        names = self.labels or [f"LABEL_{k}" for k in range(self.num_labels)]
        config.id2label = dict(enumerate(names))
        config.label2id = {name: k for k, name in enumerate(names)}
        config.problem_type = _KINDS[self.kind][1]
        return config

    def auto_class(self, config):
        """The Auto class that makes such models, of which it knows one for `config`.

        Raises:
            UserError: there is no such model of this family.
        """
        import transformers

        import fastffn.models  # noqa: F401 - registers its models

        auto = getattr(transformers, _KINDS[self.kind][0])
        if type(config) not in auto._model_mapping:
            family = getattr(config, "model_type", None) or type(config).__name__
            raise UserError(
                f"transformers has no {family} model with a head for {self.kind}: choose another "
                f"encoder, or register its class with {auto.__name__}"
            )
        return auto

    def is_of_another_task(self, config) -> bool:
        """Whether a stored configuration's class has a head of another kind than this one.

        Heads of different kinds may share names: BERT's for texts and for tokens both end in
        `classifier`.
        """
        import transformers

        mine = _KINDS[self.kind][0]
        autos = {auto for auto, _ in _KINDS.values()} - {mine, "AutoModel"}
        mappings = [getattr(transformers, name)._model_mapping for name in autos]
        names = {m[type(config)].__name__ for m in mappings if type(config) in m}
        return self.kind != "none" and bool(names & {*(config.architectures or ())})

    def model(self, config, dtype: str | torch.dtype | None, like: nn.Module | None) -> nn.Module:
        """A random model with this head, on the device of `like` if that is given.

        Raises:
            UserError: no model can be built from the configuration.
        """
        auto = self.auto_class(config)
        try:
            model = auto.from_config(self.configured(config), dtype=as_dtype(dtype))
        except UserError:
            raise
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            message = str(error).strip().split("\n", 1)[0]
            raise UserError(f"config: no model can be built from it: {message}") from error
        return model if like is None else model.to(next(like.parameters()).device)

    def is_on(self, model: nn.Module) -> bool:
        """Whether a model has this head, with these classes in this order."""
        model = unwrapped(model)
        config = getattr(model, "config", None)
        if self.kind == "none" or config is None:
            return False
        try:
            auto = self.auto_class(config)
        except UserError:
            return False
        theirs = list(config.id2label.values())
        return (
            isinstance(model, auto._model_mapping[type(config)])
            and len(theirs) == self.num_labels
            and (not self.labels or tuple(theirs) == self.labels)
        )


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """A dtype by name; None: float32."""
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or "float32")


def head_state(model: nn.Module) -> dict:
    """The part of a model's `state_dict` that is not its encoder's."""
    model = unwrapped(model)
    inner = {id(tensor) for tensor in _tensors(Encoder(model).base)}
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if id(t) not in inner}


def copy_head(source: nn.Module, target: nn.Module, head: Head) -> None:
    """Copies what both models' heads have in common.

    Between models of one family that have the same head: all of it. Else, where the shapes agree:
    the dense module on the first token, which BERT has as its pooler, and with the same head its
    last product.
    """
    source, target = unwrapped(source), unwrapped(target)
    same = head.is_on(source)
    if type(source.config) is type(target.config):
        if same:
            mine = head_state(target)
            for name, tensor in head_state(source).items():
                mine[name].data.copy_(tensor)
        return
    pairs = [(("classifier.dense", "pooler.dense"), "dense")]
    if same:
        pairs += [(("classifier.out_proj", "classifier"), "classifier")]
        pairs += [(("qa_outputs",), "qa_outputs")]
    for places, name in pairs:
        to = find(target, name)
        candidates = [find(root, p) for p in places for root in (source, Encoder(source).base)]
        for of in candidates:
            if isinstance(of, nn.Linear) and to is not None and of.weight.shape == to.weight.shape:
                to.load_state_dict(of.state_dict())
                break


def _tensors(module: nn.Module):
    yield from module.parameters()
    yield from module.buffers()
