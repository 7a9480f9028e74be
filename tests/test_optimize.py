"""optimize: the same outputs at tokens, whoever computes them; and what it refuses."""

import copy
import gc
import importlib
import os
import pickle
import re
import subprocess
import sys
import threading
import weakref
from unittest import mock

import pytest
import torch
import transformers
from encoders import VOCABULARY, WIDTH
from patched_models import inputs, model
from torch import nn
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput

import fastffn
from fastffn.errors import UserError
from fastffn.ops import backend
from fastffn.serve import graphs
from fastffn.serve.grouped import Grouped
from fastffn.serve.packed_encoder import PackedEncoder

PACKED = ("albert", "bert", "camembert", "data2vec-text", "distilbert", "efficientbert")
PACKED += ("electra", "ernie", "megatron-bert", "modernbert", "mpnet", "roberta")
PACKED += ("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl")
RELATIVE = ("modernbert", "mpnet")
NOT_PACKED = {"deberta-v2": "disentangled", "vit": "reads no tokens"}
HEADS = [
    ("bert", "ForSequenceClassification"),
    ("bert", "ForQuestionAnswering"),
    ("bert", "ForMaskedLM"),
    ("roberta", "ForTokenClassification"),
    ("distilbert", "ForSequenceClassification"),
    ("electra", "ForSequenceClassification"),
    ("albert", "ForSequenceClassification"),
    ("mpnet", "ForSequenceClassification"),
    ("efficientbert", "ForSequenceClassification"),
]
PAD = 1
optimize_module = importlib.import_module("fastffn.serve.optimize")  # its name is the function's


def batch(lengths=(7, 0, 1, 12, 3), side="right", seed=1):
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(4, VOCABULARY, (len(lengths), longest), generator=generator)
    columns = torch.arange(longest)
    columns = columns if side == "right" else longest - 1 - columns
    mask = (columns < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}


def close(got, want, what=""):
    got, want = got.float(), want.float()
    tolerance = 2e-4 * max(1.0, want.abs().max().item())
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0, msg=lambda m: f"{what}: {m}")


def same(made, of, given, tokens=None):
    """Outputs equal the model's; those of tokens where there are tokens."""
    with torch.no_grad():
        want, got = of(**given), made(**given)
    mask = given.get("attention_mask") if tokens is None else tokens
    assert set(want) == set(got)
    for name, x in want.items():
        y = got[name]
        assert y.shape == x.shape and not y.requires_grad, name
        if mask is not None and x.shape[:2] == mask.shape:
            x, y = x[mask != 0], y[mask != 0]
        elif mask is not None:  # of a text without tokens, or that begins later, nothing is said
            real = mask[:, 0] != 0
            x, y = x[real], y[real]
        close(y, x, name)
    return got


# -- packed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PACKED)
def test_outputs_are_the_models(kind):
    of = model(kind)
    made = fastffn.optimize(of)
    assert made.report.engine == "csrc" and made.report.largest < 1e-4, str(made.report)
    ragged = batch()
    hidden = same(made, of, ragged).last_hidden_state
    assert (hidden[ragged["attention_mask"] == 0] == 0).all()
    same(made, of, batch([5, 5]))
    same(made, of, {"input_ids": batch([9])["input_ids"]})
    same(made, of, batch([4, 9, 6], side="left"))
    same(made, of, batch([64 - 2 * (PAD + 1), 2]))
    with torch.no_grad():
        got, want = made(**batch([6, 2]), return_dict=False), of(**batch([6, 2]))
    assert type(got) is tuple
    close(got[0][0], want[0][0])


@pytest.mark.parametrize("kind", PACKED)
def test_further_inputs(kind):
    of = model(kind)
    made, given = fastffn.optimize(of), batch()
    shape = given["input_ids"].shape
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(2, 60, shape, generator=generator).sort(1).values
    if kind not in ("distilbert", "modernbert", "mpnet"):
        kinds = torch.randint(of.config.type_vocab_size, shape, generator=generator)
        for dtype in (torch.long, torch.int32):
            same(made, of, {**given, "token_type_ids": kinds.to(dtype)})
    for positions in (places, places[:1], places.int()):
        same(made, of, {**given, "position_ids": positions})
    words = of.get_input_embeddings()(given["input_ids"])
    by_words = {"inputs_embeds": words.detach(), "attention_mask": given["attention_mask"]}
    same(made, of, by_words)
    same(made, of, {**by_words, "position_ids": places})
    same(made, of, {**given, "input_ids": given["input_ids"].int()})
    same(made, of, {**given, "attention_mask": given["attention_mask"].float()})
    same(made, of, {**given, "attention_mask": given["attention_mask"].bool()})


@pytest.mark.parametrize("kind", [kind for kind in PACKED if kind not in RELATIVE])
def test_holes_in_texts(kind):
    of, given = model(kind), batch([12, 9, 12])
    given["attention_mask"][0, 3:5] = 0
    given["attention_mask"][2, 0] = 0
    same(fastffn.optimize(of), of, given)


@pytest.mark.parametrize("kind", RELATIVE)
def test_holes_in_relative_positions_are_refused(kind):
    made, given = fastffn.optimize(model(kind)), batch([12, 9])
    given["attention_mask"][0, 3] = 0
    with pytest.raises(UserError, match="attention_mask: has holes"):
        made(**given)


@pytest.mark.parametrize("kind, head", HEADS)
def test_heads(kind, head):
    of = model(kind, head)
    made = fastffn.optimize(of)
    assert made.report.engine == "csrc" and type(made) is type(of)
    same(made, of, batch())
    assert made.report.output in ("logits", "start_logits")
    assert made.report.agreement == (1.0 if made.report.output == "logits" else None)


@pytest.mark.parametrize("count", [0, 3])
def test_no_texts_and_no_tokens(count):
    made = fastffn.optimize(model("bert"))
    given = {"input_ids": torch.ones(count, 4, dtype=torch.long)}
    out = made(**given, attention_mask=torch.zeros(count, 4))
    assert out.last_hidden_state.shape == (count, 4, WIDTH)
    assert (out.last_hidden_state == 0).all() and out.pooler_output.shape == (count, WIDTH)


@pytest.mark.parametrize("dtype, quantize", [(torch.bfloat16, None), (None, "int8")])
@pytest.mark.parametrize("kind", ["bert", "efficientbert"])
def test_fewer_bits(kind, dtype, quantize):
    precision = quantize or "bfloat16"
    if not backend.cpp()[0].multiplies(precision):
        pytest.skip(f"this processor does not multiply {precision}")
    of = transformers.AutoModel.from_config(model(kind).config).eval()  # of the usual weights
    made = fastffn.optimize(of, dtype=dtype, quantize=quantize)
    report = made.report
    assert (report.engine, report.precision) == ("csrc", precision)
    assert 1e-5 < report.typical < 0.03 and report.largest < 0.1
    assert made(**batch()).last_hidden_state.dtype == torch.float32
    assert precision in str(report) and "last_hidden_state" in str(report)


@pytest.mark.parametrize("head", ["", "ForSequenceClassification"])
def test_a_model_that_is_in_bfloat16(head):
    of = model("bert", head).bfloat16()
    if backend.cpp()[0].multiplies("bfloat16"):
        assert fastffn.optimize(of).report.precision == "bfloat16"
    made = fastffn.optimize(of, dtype=torch.float32)
    same(made, copy.deepcopy(of).float(), batch())
    assert all(p.dtype == torch.bfloat16 for p in of.parameters())


# -- the given model -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "mpnet", "deberta-v2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_given_model_is_not_changed(kind, dtype):
    if not backend.cpp()[0].multiplies(str(dtype).removeprefix("torch.")):
        pytest.skip(f"this processor does not multiply {dtype}")
    of = model(kind)
    of.train()
    of.get_input_embeddings().eval()
    before = {name: p.clone() for name, p in of.named_parameters()}
    modes = [module.training for module in of.modules()]
    classes = [type(module) for module in of.modules()]
    fastffn.optimize(of, dtype=dtype)
    assert [module.training for module in of.modules()] == modes
    assert [type(module) for module in of.modules()] == classes
    assert all(p.requires_grad and p.dtype == torch.float32 for p in of.parameters())
    assert all(torch.equal(p, before[name]) for name, p in of.named_parameters())
    of(**inputs(kind)).last_hidden_state.sum().backward()


@pytest.mark.parametrize("kind", ["bert", "mpnet", "albert"])
def test_the_given_model_may_be_let_go(kind):
    of = model(kind)
    with torch.no_grad():
        want = of(**inputs(kind)).last_hidden_state
    made = fastffn.optimize(of)
    matrices = [p for n, p in of.named_parameters() if p.dim() == 2 and "layer" in n]
    storages = [p.untyped_storage() for p in matrices]
    watched = [weakref.ref(storage) for storage in storages]
    del of, matrices, storages
    gc.collect()
    assert len(watched) > 5 and all(each() is None for each in watched)
    mask = inputs(kind)["attention_mask"] != 0
    close(made(**inputs(kind)).last_hidden_state[mask], want[mask])


def test_a_patched_model():
    of = fastffn.patch(model("bert"))
    made = fastffn.optimize(of)
    assert made.report.engine == "csrc"
    same(made, of, batch())


def test_copies_are_the_model_and_files_are_refused(tmp_path):
    of = model("bert", "ForSequenceClassification")
    made = fastffn.optimize(of)
    same(copy.deepcopy(made), of, batch())
    with pytest.raises(UserError, match="cannot be pickled"):
        pickle.dumps(made)
    for save in (made.state_dict, lambda: made.save_pretrained(tmp_path)):
        with pytest.raises(UserError, match="cannot be saved"):
            save()


def test_no_training():
    made = fastffn.optimize(model("bert"))
    with pytest.raises(UserError, match="optimised for inference"):
        made.train()
    assert made.eval() is made
    same(made, model("bert"), batch())


# -- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "mpnet", "deberta-v2"])
def test_many_threads_share_a_model(kind):
    made = fastffn.optimize(model(kind))
    batches = [batch([1 + (5 * k + j) % 40 for j in range(1 + k % 4)], seed=k) for k in range(24)]
    fresh = fastffn.optimize(model(kind))  # what grows with the lengths has not grown yet
    want = [made(**given).last_hidden_state for given in batches]
    got, barrier = [None] * len(batches), threading.Barrier(6)

    def work(first):
        barrier.wait()
        for k in range(first, len(batches), 6):
            got[k] = fresh(**batches[k]).last_hidden_state

    workers = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


# -- errors --------------------------------------------------------------------------------------


def test_bad_inputs_and_that_it_goes_on_after_them():
    of = model("bert", "ForSequenceClassification")
    made, given = fastffn.optimize(of), batch()
    ids, shape = given["input_ids"], given["input_ids"].shape
    bad = {
        "token 60: the model has 60": {"input_ids": ids.clone().fill_(VOCABULARY)},
        "token -1": {"input_ids": ids.clone().fill_(-1)},
        "segment 2": {"token_type_ids": torch.full(shape, 2)},
        "position 64": {"position_ids": torch.full(shape, 64)},
        "position_ids": {"position_ids": torch.zeros(2, 3, dtype=torch.long)},
        "token_type_ids": {"token_type_ids": torch.zeros(2, 3, dtype=torch.long)},
        "attention_mask": {"attention_mask": torch.ones(2, 3)},
        "either input_ids": {"input_ids": None},
        "neither hidden states": {"output_hidden_states": True},
        "nor attentions": {"output_attentions": True},
        "0 tokens": {"input_ids": ids[:, :0], "attention_mask": None},
    }
    for words, changes in bad.items():
        with pytest.raises(UserError, match=words):
            made(**{**given, **changes})
    same(made, of, given)
    with torch.no_grad():
        mask = given["attention_mask"][:, None, None]
        with pytest.raises(UserError, match="attention_mask"):
            made(**{**given, "attention_mask": mask})


@pytest.mark.parametrize("kind, most", [("bert", 64), ("roberta", 62), ("distilbert", 64)])
def test_texts_beyond_the_positions(kind, most):
    of = model(kind)
    made = fastffn.optimize(of)
    same(made, of, batch([most]))
    with pytest.raises(UserError, match=f"{most + 1} tokens, the model has {most} positions"):
        made(**batch([most + 1]))


def test_what_optimize_refuses():
    of = model("bert")
    with pytest.raises(UserError, match=r"dtype: torch\.float64"):
        fastffn.optimize(of, dtype=torch.float64)
    with pytest.raises(UserError, match='quantize: expected None or "int8"'):
        fastffn.optimize(of, quantize="int4")
    with pytest.raises(UserError, match="no encoder that is known"):
        fastffn.optimize(nn.Linear(3, 3))
    with pytest.raises(UserError, match="int8 needs csrc"):
        fastffn.optimize(model("deberta-v2"), quantize="int8")
    if not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        with pytest.raises(UserError, match=r"does not multiply torch\.float16"):
            fastffn.optimize(of, dtype=torch.float16)


def test_a_processor_with_fewer_instructions():
    code = """
import torch, fastffn
from patched_models import model
print(fastffn.optimize(model("bert")).report)
for options in ({"quantize": "int8"}, {"dtype": torch.bfloat16}):
    try:
        print(fastffn.optimize(model("bert"), **options).report)
    except fastffn.UserError as error:
        print(error)
"""
    if "avx2" not in backend.cpp()[0].available_isas():
        pytest.skip("csrc does not run on avx2 here")
    path = os.pathsep.join((os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "FASTFFN_ISA": "avx2"},
        capture_output=True,
        text=True,
    )
    first, second, third = done.stdout.splitlines()
    assert first.startswith("csrc, float32"), done
    assert "int8 needs csrc" in second and "avx2 on this processor does not" in second
    assert "torch, bfloat16" in third or "does not multiply torch.bfloat16" in third


@pytest.mark.parametrize("kind", ["bert", "efficientbert"])
def test_without_csrc(kind, monkeypatch):
    monkeypatch.setattr(backend, "cpp", lambda: (None, "FASTFFN_BACKEND=reference"))
    of = model(kind)
    made = fastffn.optimize(of)
    assert made.report.engine == "torch"
    assert made.report.why == "csrc is not there: FASTFFN_BACKEND=reference"
    same(made, of, batch((7, 1, 40, 12)))
    with pytest.raises(UserError, match="int8 needs csrc"):
        fastffn.optimize(of, quantize="int8")


# -- by torch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NOT_PACKED)
def test_what_cannot_be_packed_runs_by_torch(kind):
    of = model(kind)
    made = fastffn.optimize(of)
    report = made.report
    assert report.engine == "torch" and report.largest < 1e-4
    assert report.why and re.search(NOT_PACKED[kind], report.why), report
    if kind == "vit":
        return close(made(**inputs(kind)).last_hidden_state, of(**inputs(kind)).last_hidden_state)
    given = batch((7, 1, 40, 3, 38))
    same(made, of, given)
    same(made, of, batch([4, 9], side="left"))
    with torch.no_grad():
        states = made(**given, output_hidden_states=True).hidden_states
        tuples = made(**given, return_dict=False)
        want = of(**given, output_hidden_states=True)
    assert len(states) == len(want.hidden_states)
    mask = given["attention_mask"] != 0
    close(states[1][mask], want.hidden_states[1][mask])
    close(tuples[0][mask], want[0][mask])
    assert made.config is not None and made.dtype == torch.float32


class Adapted(nn.Module):
    """A product with a low-rank one beside it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2)
        self.up = nn.Linear(2, base.out_features)
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize(
    "where", ["attention.self.query", "attention.output.dense", "output.dense"]
)
def test_adapters_are_not_lost(where):
    of = model("bert")
    layer = of.encoder.layer[1]
    owner, _, name = where.rpartition(".")
    owner = layer.get_submodule(owner)
    setattr(owner, name, Adapted(getattr(owner, name)))
    made = fastffn.optimize(of)
    assert made.report.engine == "torch" and "a Adapted stands" in made.report.why
    same(made, of, batch((7, 1, 12)))


def test_hooks_are_not_lost():
    of = model("bert")
    of.encoder.layer[0].output.dense.register_forward_hook(lambda *args: args[2] * 2)
    made = fastffn.optimize(of)
    assert made.report.engine == "torch"
    same(made, of, batch((7, 1, 12)))


def test_padding_that_is_kept():
    of = model("bert")
    made = fastffn.optimize(of, unpad=False)
    assert (made.report.engine, made.report.why) == ("torch", "padding is kept")
    same(made, of, batch((7, 1, 12)))


def test_a_sample_of_the_users():
    of = model("bert", "ForSequenceClassification")
    made = fastffn.optimize(of, sample=batch())
    assert made.report.output == "logits" and made.report.largest < 1e-4


@pytest.mark.parametrize("kind, engine", [("bert", "csrc"), ("deberta-v2", "torch")])
def test_sentence_transformers(kind, engine, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{k}": k for k in range(4, VOCABULARY)} | {"[UNK]": 0, "[PAD]": 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    )
    model(kind).save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    first = modules.Transformer(str(tmp_path))
    pooling = modules.Pooling(WIDTH, "mean")
    of = sentence_transformers.SentenceTransformer(modules=[first, pooling], device="cpu")
    made = fastffn.optimize(of)
    assert made.report.engine == engine and made.report.largest < 1e-4
    texts = ["w4 w5 w6", "w9", "w7 w8 " * 20]
    want, got = (each.encode(texts, convert_to_tensor=True) for each in (of, made))
    close(got, want)


# -- what is compared, and what holds the encoder ------------------------------------------------


@pytest.mark.parametrize("head", ["", "ForSequenceClassification"])
def test_a_model_set_to_give_tuples(head):
    of = model("bert", head)
    of.config.return_dict = False
    report = fastffn.optimize(of).report
    assert report.output == ("logits" if head else "last_hidden_state") and report.largest < 1e-4


def test_a_sample_with_labels():
    of = model("bert", "ForSequenceClassification")
    report = fastffn.optimize(of, sample={**batch((5, 3)), "labels": torch.tensor([0, 1])}).report
    assert report.output == "logits" and report.agreement == 1.0


def test_a_model_that_does_not_take_the_sample():
    of = model("bert", "ForMultipleChoice")
    with pytest.raises(UserError, match=r"BertForMultipleChoice does not take input_ids \[8, 48\]"):
        fastffn.optimize(of)
    given = {name: x.view(2, 2, 9) for name, x in batch([5, 9, 3, 4]).items()}
    made = fastffn.optimize(of, sample=given)
    assert made.report.agreement == 1.0 and made(**given).logits.shape == (2, 2)


class Turned(nn.Module):
    """A model whose first four answers are others."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, **given):
        output = self.base(**given)
        output.logits[:4] *= -1
        return output


def test_agreement_of_as_many_classes_as_tokens(monkeypatch):
    of = model("bert", "ForSequenceClassification", num_labels=48)  # the sample's length
    replaced = optimize_module._replaced
    monkeypatch.setattr(optimize_module, "_replaced", lambda *args: Turned(replaced(*args)))
    assert fastffn.optimize(of).report.agreement == 0.5


def test_agreement_of_answers_at_tokens():
    report = fastffn.optimize(model("electra", "ForPreTraining")).report
    assert (report.output, report.agreement) == ("logits", None) and report.largest < 1e-4


def test_why_float16_is_not_packed(monkeypatch):
    monkeypatch.setattr(optimize_module, "_multiplies", lambda dtype: True)
    report = fastffn.optimize(model("bert"), dtype=torch.float16).report
    assert (report.engine, report.why) == ("torch", "csrc has no float16")


class Towers(nn.Module):
    """One encoder under two names, and a tensor of its two outputs."""

    def __init__(self, kind):
        super().__init__()
        self.query = self.document = model(kind)

    def forward(self, **given):
        return self.query(**given)[0] + self.document(**given)[0]


@pytest.mark.parametrize("kind, cls", [("bert", PackedEncoder), ("deberta-v2", Grouped)])
def test_an_encoder_of_two_names(kind, cls):
    of = Towers(kind)
    made, given = fastffn.optimize(of), batch((5, 3, 40))
    assert type(made.query) is cls and made.query is made.document
    assert made.report.largest < 1e-4
    mask = given["attention_mask"] != 0
    with torch.no_grad():
        close(made(**given)[mask], of(**given)[mask])


@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
@pytest.mark.parametrize("head", ["", "ForSequenceClassification"])
def test_optimising_twice(kind, head):
    made = fastffn.optimize(model(kind, head))
    with pytest.raises(UserError, match="the model is optimised already"):
        fastffn.optimize(made)


# -- groups --------------------------------------------------------------------------------------


class Recorded(nn.Module):
    """Sums over the tokens, as outputs of all forms; and the shapes that it was called with."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.shapes = classes, []

    def forward(self, input_ids, attention_mask, position_ids=None, question=False, loss=False):
        self.shapes.append(tuple(input_ids.shape))
        x = (input_ids * attention_mask).float()
        if position_ids is not None:
            x = x + position_ids * attention_mask
        if question:
            return QuestionAnsweringModelOutput(start_logits=x, end_logits=-x)
        logits = x.sum(1, keepdim=True) * torch.arange(1, 1 + self.classes)
        loss = logits.sum() if loss else None
        return SequenceClassifierOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("classes", [1, 2, 5, 40, 70])
@pytest.mark.parametrize(
    "lengths", [(5, 2, 0, 40, 70, 33), (2, 2, 1), (0, 0, 5), (70, 70)], ids=str
)
def test_groups_give_what_the_whole_gives(classes, lengths):
    plain, inner, given = Recorded(classes), Recorded(classes), batch(lengths)
    grouped = Grouped(inner)
    assert torch.equal(grouped(**given).logits, plain(**given).logits)
    places = torch.arange(max(lengths))[None]
    for options in ({"question": True}, {"position_ids": places}, {"loss": True}):
        want, got = plain(**given, **options), grouped(**given, **options)
        assert want.keys() == got.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_groups_are_shorter():
    inner = Recorded(2)
    grouped, given = Grouped(inner), batch((5, 2, 0, 40, 70, 33))
    grouped(**given)
    assert inner.shapes == [(1, 1), (2, 2), (3, 3), (2, 5), (2, 40), (1, 70)]
    inner.shapes.clear()
    grouped(**given)  # knows its outputs now
    assert inner.shapes == [(1, 1), (2, 5), (2, 40), (1, 70)]
    inner.shapes.clear()
    Grouped(inner)(**batch((5, 9), side="left"))  # padding stands before: as it is
    Grouped(inner)(batch((5, 9))["input_ids"], batch((5, 9))["attention_mask"])
    assert inner.shapes == [(2, 9), (2, 9)]


class Scores(nn.Module):
    """Outputs whose names do not tell that they are of tokens, or that they are not."""

    def forward(self, input_ids, attention_mask, pairs=False):
        x = (input_ids * attention_mask).float()
        given = {"logits": x, "tokens": x[:, :, None], "classes": x.sum(1)[:, None, None]}
        given["classes"] = given["classes"].repeat(1, 16, 2)  # 16: a bucket's length, by chance
        return {**given, "pairs": x[:, :, None] * x[:, None]} if pairs else given


class Pairs(Scores):
    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids, attention_mask, pairs=True)


def wrapped(kind, inner):
    return Grouped(inner) if kind == "grouped" else graphs.Graphed(inner, record=recorder([]))


@pytest.mark.parametrize("kind", ["grouped", "graphed"])
@pytest.mark.parametrize("inner", [Scores(), Pairs()])
@pytest.mark.parametrize("lengths", [(16, 3, 60), (16, 16, 40, 2), (7, 16, 3), (1, 0)], ids=str)
def test_outputs_of_tokens_are_told_by_what_moves(kind, inner, lengths):
    given = batch(lengths)
    given = {name: nn.functional.pad(x, (0, 2)) for name, x in given.items()}
    want, got = inner(**given), wrapped(kind, inner)(**given)
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("kind", ["grouped", "graphed"])
def test_logits_of_tokens(kind):
    of = model("electra", "ForPreTraining")
    with torch.no_grad():
        same(wrapped(kind, of), of, batch((40, 3, 7)))


@pytest.mark.parametrize("kind", ["grouped", "graphed"])
@pytest.mark.parametrize("lengths", [(9, 9, 9), (9, 2, 4)], ids=str)
def test_one_row_for_all_texts(kind, lengths):
    of, given = model("bert"), batch(lengths)
    made, row = wrapped(kind, of), torch.ones(1, 9, dtype=torch.long)
    with torch.no_grad():
        same(made, of, {**given, "token_type_ids": row})
    if kind == "graphed":
        row[0, 7:] = 0
        got = made(given["input_ids"], row).last_hidden_state[:, :7]
        with torch.no_grad():
            close(got, of(given["input_ids"], row.expand(3, 9)).last_hidden_state[:, :7])


def test_one_mask_for_all_texts_is_the_models():
    inner = Recorded(2)
    given = {"input_ids": torch.ones(3, 9), "attention_mask": torch.tensor([[1] * 5 + [0] * 4])}
    assert torch.equal(Grouped(inner)(**given).logits, Recorded(2)(**given).logits)
    assert inner.shapes == [(3, 9)]


# -- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, filled",
    [((1, 1), (1, 16)), ((3, 17), (4, 32)), ((8, 64), (8, 64)), ((9, 65), (16, 128))]
    + [((5, 500), (8, 500)), ((1, 449), (1, 500))],
)
def test_buckets(shape, filled):
    assert graphs.bucket(*shape, 500) == filled


def test_buckets_end_with_the_positions():
    with pytest.raises(UserError, match="501 tokens, the model has 500 positions"):
        graphs.bucket(1, 501, 500)
    assert graphs.bucket(1, 501) == (1, 512)
    for shape in ((0, 5), (5, 0)):
        with pytest.raises(UserError, match="at least one text"):
            graphs.bucket(*shape)


def recorder(recorded):
    """As a CUDA graph: what is replayed reads the same buffers and writes the same outputs."""

    def record(forward):
        output = forward()
        recorded.append(output)

        def replay():
            for name, value in forward().items():
                output[name].copy_(value)
            return output

        return replay

    return record


@pytest.mark.parametrize("kind, head", [("bert", ""), ("roberta", "ForQuestionAnswering")])
def test_replays_are_the_models(kind, head):
    of, recorded = model(kind, head), []
    made = graphs.Graphed(of, record=recorder(recorded))
    first = made(**batch([5, 9, 3]))
    kept = {name: x.clone() for name, x in first.items()}
    for given in (batch([2, 9, 3], seed=5), batch([16, 1, 1, 1]), batch([8, 8, 8], side="left")):
        same(made, of, given)
    assert len(recorded) == 1  # all in the bucket of 4 x 16
    assert all(torch.equal(first[name], kept[name]) for name in kept)  # not the graph's memory
    same(made, of, {"input_ids": batch([20])["input_ids"]})
    same(made, of, batch([62] * 5))
    assert len(recorded) == 3
    with torch.no_grad():
        hidden = made(**batch([4]), output_hidden_states=True).hidden_states
    assert len(hidden) == 4 and len(recorded) == 3


def test_what_is_replayed_and_what_is_not():
    of, recorded = model("bert"), []
    made, given = graphs.Graphed(of, record=recorder(recorded)), batch([5, 9])
    same(made, of, {**given, "return_dict": True, "token_type_ids": None, "past_key_values": None})
    assert len(recorded) == 1
    with torch.no_grad():
        close(made(**given, return_dict=False)[0], of(**given)[0])
        mask = torch.zeros(2, 1, 9, 9)
        close(made(given["input_ids"], mask)[0], of(given["input_ids"], mask)[0])
        words = of.get_input_embeddings()(given["input_ids"])
        close(made(inputs_embeds=words)[0], of(inputs_embeds=words)[0])
    of.config.output_hidden_states = True
    made = graphs.Graphed(of, record=recorder(recorded))
    assert len(made(**given).hidden_states) == 4 and len(recorded) == 1


def test_pixels_and_choices_are_not_replayed():
    of, recorded = model("vit"), []
    with torch.no_grad():
        want = of(**inputs("vit")).last_hidden_state
    close(graphs.Graphed(of, record=recorder(recorded))(**inputs("vit")).last_hidden_state, want)
    of, given = model("bert", "ForMultipleChoice"), batch([5, 9, 3, 4])
    given = {name: x.view(2, 2, 9) for name, x in given.items()}
    with torch.no_grad():
        want = of(**given).logits
    close(graphs.Graphed(of, record=recorder(recorded))(**given).logits, want)
    assert not recorded


def test_streams_wait_for_each_others_outputs(monkeypatch):
    log = []

    class Stream:
        def wait_event(self, event):
            log.append(("wait", event))

        def record_event(self):
            log.append(("record", len(log)))
            return log[-1][1]

    def record(forward):
        output = forward()
        return lambda: log.append("replay") or output

    monkeypatch.setattr(graphs, "_stream", lambda device: Stream())
    made = graphs.Graphed(model("bert"), record=record)
    for _ in range(3):
        made(**batch([4]))
    assert log[:2] == ["replay", ("record", 1)]
    assert log[2:5] == [("wait", 1), "replay", ("record", 4)] and log[5] == ("wait", 4)


def test_recordings_share_memory_and_let_other_threads_work():
    names = ("Stream", "current_stream", "stream", "CUDAGraph")
    fakes = {name: mock.MagicMock() for name in names}
    fakes["graph"] = mock.create_autospec(torch.cuda.graph)
    with mock.patch.multiple(torch.cuda, **fakes):
        record = graphs._Recorder()
        assert record(lambda: "first")() == "first" and record(lambda: "second")() == "second"
    first, second = (call.kwargs for call in fakes["graph"].call_args_list)
    assert first["capture_error_mode"] == second["capture_error_mode"] == "thread_local"
    assert first["pool"] is None and second["pool"] is fakes["CUDAGraph"]().pool()


def test_more_buckets_than_are_kept():
    of, recorded = model("bert"), []
    made = graphs.Graphed(of, most=1, record=recorder(recorded))
    for lengths in ([3], [20], [4], [40, 2]):
        same(made, of, batch(lengths))
    assert len(recorded) == 1
    kinds = torch.zeros(1, 3, dtype=torch.long)
    same(made, of, {**batch([3]), "token_type_ids": kinds})


def test_callers_in_threads_share_graphs():
    of, recorded = model("bert"), []
    made = graphs.Graphed(of, record=recorder(recorded))
    batches = [batch([1 + k % 30, 3], seed=k) for k in range(20)]
    got = [None] * len(batches)

    def work(first):
        for k in range(first, len(batches), 4):
            got[k] = made(**batches[k]).last_hidden_state

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for given, out in zip(batches, got, strict=True):
        mask = given["attention_mask"] != 0
        with torch.no_grad():
            close(out[mask], of(**given).last_hidden_state[mask])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, head", [("bert", ""), ("efficientbert", ""), ("modernbert", "")])
def test_graphs_on_a_device(kind, head, dtype):
    of = model(kind, head, attention="sdpa").cuda()
    made = fastffn.optimize(of, dtype=dtype)
    assert made.report.engine == "cuda-graphs"
    for lengths in ([5, 9, 3], [2, 9, 3, 1], [40], [5, 9, 3]):
        given = {name: x.cuda() for name, x in batch(lengths).items()}
        with torch.no_grad():
            want = of(**given).last_hidden_state
        got, mask = made(**given).last_hidden_state, given["attention_mask"] != 0
        error = (got.float() - want)[mask].square().mean().sqrt() / want[
            mask
        ].square().mean().sqrt()
        assert error < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.gpu
def test_int8_on_a_device_is_refused():
    with pytest.raises(UserError, match='"int8" is for the CPU'):
        fastffn.optimize(model("bert").cuda(), quantize="int8")


def test_the_packed_encoder_knows_what_it_is():
    of = model("bert")
    made = PackedEncoder(copy.deepcopy(of))
    assert made.dtype == torch.float32 and made.device == torch.device("cpu")
    assert made.get_input_embeddings().weight.shape == (VOCABULARY, WIDTH)
    assert made.config.model_type == "bert"
