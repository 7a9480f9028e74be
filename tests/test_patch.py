"""patch: what it leaves alone, and that what it changes is computed as before, only faster."""

import contextlib
import copy
import io
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from encoders import LAYERS, WIDTH
from oracle import assert_accurate
from patched_models import PATCHED, PRE_NORM, inputs, model, without_dropout
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN

import fastffn
from fastffn.errors import UserError
from fastffn.models import seams
from fastffn.models.architectures import ALL, Encoder
from fastffn.models.pieces import activation_name
from fastffn.ops import backend, reference

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")

POST_NORM = tuple(kind for kind in PATCHED if kind not in PRE_NORM)


@pytest.fixture(autouse=True)
def _always(request, monkeypatch):
    """The models here are too small for the ops to be worth it."""
    if "sizes" not in request.fixturenames:
        for name in ("whole_unit", "residual_norm", "elementwise"):
            monkeypatch.setattr(seams.worthwhile, name, lambda *_: True)


@pytest.fixture
def sizes():
    """Asked for by tests of what is worth it."""


@contextlib.contextmanager
def counted():
    """How often each op is called for a seam."""
    calls = {}

    def counting(name, function):
        def call(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    with (
        mock.patch.object(seams.op, "run", counting("ffn", seams.op.run)),
        mock.patch.object(seams, "residual_norm", counting("norm", seams.residual_norm)),
        mock.patch.object(seams, "elementwise", counting("elementwise", seams.elementwise)),
    ):
        yield calls


def states(made, kind, **kwargs):
    """All hidden states, and all attention maps if asked for."""
    with torch.no_grad():
        out = made(**cast(inputs(kind), made), output_hidden_states=True, **kwargs)
    return (*out.hidden_states, *(out.attentions or ()), out[0])


def cast(batch, made):
    """For the model's device, and pixels in its type."""
    batch = {name: x.to(made.device) for name, x in batch.items()}
    return {name: x.to(made.dtype) if x.is_floating_point() else x for name, x in batch.items()}


def gradients(made, kind):
    """Of every parameter, of a loss that weighs all outputs."""
    made.zero_grad()
    y = made(**cast(inputs(kind), made))[0]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * weights.to(y)).sum().backward()
    return {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def anatomy(made):
    return {
        name: (type(module), sorted(module.__dict__), list(module._modules))
        for name, module in made.named_modules()
    }


def same(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_every_known_architecture_is_tested():
    assert {*PATCHED, "efficientbert"} == set(ALL)


@pytest.mark.parametrize("kind", PATCHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_outputs_by_the_oracle_rule(kind, dtype):
    made = model(kind).to(dtype)
    exact, plain = states(copy.deepcopy(made).double(), kind), states(made, kind)
    with counted() as calls:
        mine = states(fastffn.patch(made), kind)
    for one, true, other in zip(mine, exact, plain, strict=True):
        assert one.dtype == other.dtype
        assert_accurate(one, true, other, kind)
    post = {"ffn": LAYERS, "norm": LAYERS}
    assert calls == ({"elementwise": LAYERS} if kind in PRE_NORM else post)


@pytest.mark.parametrize("kind", PATCHED)
def test_gradients_by_the_oracle_rule(kind):
    made = without_dropout(model(kind))
    exact = gradients(copy.deepcopy(made).double(), kind)
    plain = gradients(made, kind)
    mine = gradients(fastffn.patch(made), kind)
    assert mine.keys() == plain.keys()
    whole = max(g.abs().max().item() for g in exact.values())
    for name, gradient in mine.items():
        assert_accurate(gradient, exact[name], plain[name], name, floor=1e-6 * whole)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PATCHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(kind, dtype):
    made = without_dropout(model(kind)).to("cuda", dtype)
    wide = copy.deepcopy(made).double()
    exact, plain = (states(wide, kind), gradients(wide, kind)), gradients(made, kind)
    outputs = states(made, kind)
    fastffn.patch(made)
    for one, true, other in zip(states(made, kind), exact[0], outputs, strict=True):
        assert_accurate(one, true, other, kind)
    whole = max(g.abs().max().item() for g in exact[1].values())
    floor = (1e-6 if dtype == torch.float32 else 1e-2) * whole
    for name, gradient in gradients(made, kind).items():
        assert_accurate(gradient, exact[1][name], plain[name], name, floor=floor)


@pytest.mark.parametrize("kind", PATCHED)
def test_the_state_dict_is_the_models_own(kind, tmp_path):
    made = model(kind)
    before, exact = made.state_dict(), states(made, kind)
    fastffn.patch(made)
    after = made.state_dict()
    assert list(before) == list(after)
    assert all(before[name].data_ptr() == after[name].data_ptr() for name in before)
    mine = states(made, kind)
    made.save_pretrained(tmp_path)
    loaded = type(made).from_pretrained(tmp_path, attn_implementation="eager")
    assert same(states(loaded, kind), exact)
    assert same(states(fastffn.patch(loaded), kind), mine)


@pytest.mark.parametrize("kind", PATCHED)
def test_unpatch_leaves_nothing(kind):
    made = model(kind)
    states(made, kind)  # transformers installs its recorders at the first call that records
    before, exact = anatomy(made), states(made, kind)
    assert fastffn.patch(made) is made
    assert anatomy(made) != before
    assert repr(made).count("by fastffn") > 0
    assert fastffn.unpatch(made) is made
    assert anatomy(made) == before
    assert same(states(made, kind), exact)
    assert fastffn.unpatch(made) is made


@pytest.mark.parametrize("kind", PATCHED)
def test_hidden_states_and_attentions_are_recorded(kind):
    made = model(kind)
    plain = states(made, kind, output_attentions=True)
    mine = states(fastffn.patch(made), kind, output_attentions=True)
    assert len(mine) == len(plain) == 2 * LAYERS + 2
    for one, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", PATCHED)
def test_copies_are_patched_by_themselves(kind):
    made, pickled = fastffn.patch(model(kind)), io.BytesIO()
    torch.save(made, pickled)  # before transformers installs recorders, which cannot be saved
    pickled.seek(0)
    mine = states(made, kind)
    with counted() as expected:
        made(**inputs(kind))
    for copied in (copy.deepcopy(made), torch.load(pickled, weights_only=False)):
        assert same(states(copied, kind), mine)
        with counted() as calls:
            copied(**inputs(kind))
        assert calls == expected
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(0.5)
        assert not same(states(copied, kind), mine)
        fastffn.unpatch(copied)
        assert same(states(made, kind), mine)


@pytest.mark.parametrize("kind", PATCHED)
def test_gradient_checkpointing(kind):
    made = fastffn.patch(model(kind)).train()  # with dropout: masks are drawn again alike
    if not made.supports_gradient_checkpointing:
        pytest.skip("transformers has none for it")

    def run():
        torch.manual_seed(5)
        return gradients(made, kind)

    plain = run()
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = Encoder(made, ALL).layers[0]
    with mock.patch.object(
        checkpointed,
        "_gradient_checkpointing_func",
        wraps=checkpointed._gradient_checkpointing_func,
    ) as used:
        again = run()
    assert used.called
    assert plain.keys() == again.keys()
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


COMPILED = ("bert", "modernbert")  # the others take seconds too


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in COMPILED else [pytest.mark.slow]) for kind in PATCHED],
)
def test_compiles_as_one_graph(kind):
    torch._dynamo.reset()
    made = model(kind, num_hidden_layers=1)
    fastffn.patch(without_dropout(made))
    grads = gradients(made, kind)
    plain = made(**inputs(kind))[0]
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    found = {name.removeprefix("_orig_mod."): g for name, g in gradients(compiled, kind).items()}
    torch.testing.assert_close(compiled(**inputs(kind))[0], plain)
    for name, gradient in found.items():  # of what is unused: zeros instead of none
        expected = grads.get(name, torch.zeros(()))
        torch.testing.assert_close(gradient, expected.expand_as(gradient), atol=1e-4, rtol=1e-3)
    assert grads.keys() <= found.keys()


@pytest.mark.parametrize(
    "head", ["ForMaskedLM", "ForQuestionAnswering", "ForSequenceClassification"]
)
@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "distilbert", "electra", "mpnet", "modernbert"]
)
def test_heads(kind, head):
    made = without_dropout(model(kind, head))
    labels = {"labels": torch.tensor([0, 1])}
    if head == "ForMaskedLM":
        labels = {"labels": inputs(kind)["input_ids"]}
    elif head == "ForQuestionAnswering":
        labels = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([2, 4])}

    def loss():
        made.zero_grad()
        value = made(**inputs(kind), **labels).loss
        value.backward()
        return value.detach(), next(made.base_model.parameters()).grad.clone()

    plain = loss()
    fastffn.patch(made)
    for one, other in zip(loss(), plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


class Adapter(nn.Linear):
    """A replacement of a product, as LoRA makes them."""

    def forward(self, x):
        return super().forward(x) + 1


def first_layer(made):
    return Encoder(made, ALL).layers[0]


def replaced(module, name):
    old = getattr(module, name)
    new = Adapter(old.in_features, old.out_features, old.bias is not None)
    new.load_state_dict(old.state_dict())
    setattr(module, name, new)


INTRUSIONS = {
    "hook on the intermediate": lambda layer: layer.intermediate.register_forward_hook(
        lambda module, args, out: out * 2
    ),
    "hook on the output": lambda layer: layer.output.register_forward_pre_hook(
        lambda module, args: (args[0] * 2, args[1])
    ),
    "hook on a product": lambda layer: layer.output.dense.register_forward_hook(
        lambda module, args, out: out * 2
    ),
    "hook on the activation": lambda layer: (
        layer.intermediate.intermediate_act_fn.register_forward_hook(lambda m, a, out: out * 2)
    ),
    "hook on the norm": lambda layer: layer.output.LayerNorm.register_forward_hook(
        lambda module, args, out: out * 2
    ),
    "hook on attention's product": lambda layer: layer.attention.output.dense.register_forward_hook(
        lambda m, a, out: out * 2
    ),
    "replaced first product": lambda layer: replaced(layer.intermediate, "dense"),
    "replaced second product": lambda layer: replaced(layer.output, "dense"),
    "replaced activation": lambda layer: setattr(
        layer.intermediate, "intermediate_act_fn", nn.Tanh()
    ),
    "replaced norm": lambda layer: setattr(layer.output, "LayerNorm", nn.Identity()),
    "parametrised product": lambda layer: nn.utils.parametrizations.weight_norm(layer.output.dense),
}


@pytest.mark.parametrize("what", INTRUSIONS)
def test_what_sits_on_the_modules_takes_effect(what):
    made = model("bert")
    plain = copy.deepcopy(made)
    INTRUSIONS[what](first_layer(plain))
    expected = states(plain, "bert")
    fastffn.patch(made)
    before = states(made, "bert")
    INTRUSIONS[what](first_layer(made))
    for one, other in zip(states(made, "bert"), expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    if what != "parametrised product":
        assert not same(states(made, "bert"), before)


@pytest.mark.parametrize("kind", ["distilbert", "albert", "modernbert", "mpnet"])
def test_what_sits_on_other_layers_takes_effect(kind):
    def intrude(made):
        found = Encoder(made, ALL).feed_forward(0)
        for module in (found.down, found.norm, Encoder(made, ALL).attention_block(0).output):
            module.register_forward_hook(lambda module, args, out: out + args[0].mean())

    made = model(kind)
    plain = copy.deepcopy(made)
    intrude(plain)
    intrude(fastffn.patch(made))
    for one, other in zip(states(made, kind), states(plain, kind), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "albert", "modernbert", "vit"])
def test_an_activation_that_is_replaced_later(kind):
    def replace(made):
        for layer in Encoder(made, ALL).layers:
            path = Encoder(made, ALL).architecture.pieces.activation
            layer.set_submodule(path, nn.Tanh())
        return made

    plain = states(replace(model(kind)), kind)
    for one, other in zip(states(replace(fastffn.patch(model(kind))), kind), plain, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_a_hook_sees_the_modules_output():
    made, seen = model("bert"), []
    layer = first_layer(made)
    layer.intermediate.register_forward_hook(lambda module, args, out: seen.append(out))
    states(made, "bert")
    states(fastffn.patch(made), "bert")
    torch.testing.assert_close(seen[1], seen[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "albert"])
def test_autocast(kind):
    made = without_dropout(model(kind))
    with torch.autocast("cpu", torch.bfloat16):
        plain, grads = states(made, kind), gradients(made, kind)
        fastffn.patch(made)
        mine, found = states(made, kind), gradients(made, kind)
    for one, other in zip(mine, plain, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=0.15, rtol=0.05)
    whole = max(gradient.abs().max() for gradient in grads.values())  # some are 0 but for rounding
    for name, gradient in found.items():
        assert gradient.dtype == grads[name].dtype
        error = (gradient - grads[name]).abs().max()
        assert error < 0.1 * grads[name].abs().max() + 0.02 * whole, name


@pytest.mark.parametrize("kind", [*POST_NORM, "modernbert"])
def test_dropout_is_where_it_was(kind):
    """The share of rows' values that training changes is the module's; none in evaluation."""
    made = fastffn.patch(model(kind))
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    quiet = states(made.train(), kind)
    assert same(states(made, kind), quiet)
    part = Encoder(made, ALL).architecture.pieces
    path = part.inner_dropout or part.dropout or part.output_dropout
    for layer in Encoder(made, ALL).layers:
        layer.get_submodule(path).p = 0.4
    torch.manual_seed(3)
    noisy = states(made, kind)
    assert not same(noisy, quiet)
    torch.manual_seed(3)
    assert same(states(made, kind), noisy)
    assert same(states(made.eval(), kind), states(made, kind))


def test_patching_again_changes_the_recomputation_alone():
    made = fastffn.patch(without_dropout(model("bert")))
    classes = [type(module) for module in made.modules()]
    expected = gradients(made, "bert")
    fastffn.patch(made)
    assert classes == [type(module) for module in made.modules()]
    for recompute in ("activation", "all"):
        fastffn.patch(made, recompute=recompute)
        assert classes != [type(module) for module in made.modules()]
        found = gradients(made, "bert")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(UserError, match="recompute: expected one of none, activation, all, got 3"):
        fastffn.patch(made, recompute=3)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu_new", F.relu, nn.Softplus()])
@pytest.mark.parametrize("kind", ["bert", "megatron-bert"])
def test_other_activations(kind, activation):
    made = model(kind)
    for layer in Encoder(made).layers:
        del layer.intermediate.intermediate_act_fn
        named = ACT2FN[activation] if isinstance(activation, str) else activation
        layer.intermediate.intermediate_act_fn = named
    plain = states(made, kind)
    with counted() as calls:
        mine = states(fastffn.patch(made), kind)
    for one, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    ours = activation in ("gelu_new", F.relu)
    assert calls.get("elementwise" if kind == "megatron-bert" else "ffn", 0) == (LAYERS * ours)


def test_activations_are_what_their_primitives_compute():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    known = {}
    for name in ACT2CLS:
        known[name] = activation_name(ACT2FN[name])
        if known[name]:
            ours = reference.PRIMITIVES[known[name]](x)
            torch.testing.assert_close(ours, ACT2FN[name](x), atol=1e-9, rtol=1e-9)
    assert known["gelu"] == known["gelu_python"] == "gelu_erf"
    assert known["gelu_new"] == known["gelu_pytorch_tanh"] == "gelu"
    assert known["quick_gelu"] == known["gelu_10"] == known["relu2"] == ""
    assert [activation_name(nn.GELU(kind)) for kind in ("none", "tanh")] == ["gelu_erf", "gelu"]
    assert activation_name(nn.LeakyReLU(0.2)) == activation_name(nn.ELU(0.5)) == ""
    assert activation_name(F.silu) == "swish"


@pytest.mark.parametrize("kind", [kind for kind in PATCHED if kind not in ("mpnet", "deberta-v2")])
def test_pieces_make_up_the_layer(kind):
    """A layer by hand, from its pieces alone, without padding."""
    made = model(kind)
    encoder = Encoder(made, ALL)
    taken, given = [], []
    layer = encoder.layers[0]

    def record(module, args, out):
        taken.append(args[0])
        given.append(out)

    hook = layer.register_forward_hook(record)
    batch = inputs(kind)
    with torch.no_grad():
        made(**{name: x[:1] for name, x in batch.items()})
    hook.remove()
    x = taken[0]
    expected = given[0][0] if isinstance(given[0], tuple) else given[0]
    attention, ffn = encoder.attention_block(0), encoder.feed_forward(0)
    if attention.bias is not None:
        assert kind == "modernbert" and "rotates" in attention.bias
        return
    act = reference.PRIMITIVES[ffn.activation]
    h = attention.norm(x) if attention.pre_norm else x
    heads = (*x.shape[:-1], attention.heads, attention.head_size)
    q, k, v = (
        product(h).view(heads).transpose(1, 2)
        for product in (attention.query, attention.key, attention.value)
    )
    mixed = (q @ k.mT * attention.scale).softmax(-1) @ v
    a = x + attention.output(mixed.transpose(1, 2).reshape(x.shape))
    a = a if attention.pre_norm else attention.norm(a)
    y = a + ffn.down(act(ffn.up(ffn.norm(a) if ffn.pre_norm else a)))
    y = y if ffn.pre_norm else ffn.norm(y)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def test_pieces_of_modernbert():
    encoder = Encoder(model("modernbert"))
    ffn, layer = encoder.feed_forward(1), encoder.layers[1]
    assert (ffn.up, ffn.gate, ffn.packed) == (None, None, layer.mlp.Wi)
    assert ffn.gene == "down(mul(gelu_erf(up(x)), gate(x)))"
    attention = encoder.attention_block(1)
    assert attention.packed is layer.attn.Wqkv and attention.head_size == 8
    assert "window" in attention.bias and "window" not in encoder.attention_block(0).bias
    assert encoder.attention_block(0).norm is None


def test_a_decoder_with_cross_attention():
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(
        vocab_size=60, intermediate_size=48, is_decoder=True, add_cross_attention=True, **sizes
    )
    made = transformers.BertModel(config).eval()
    ids, others = torch.randint(60, (2, 5)), torch.randn(2, 7, WIDTH)
    plain = made(ids, encoder_hidden_states=others)[0]
    mine = fastffn.patch(made)(ids, encoder_hidden_states=others)[0]
    torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-4)


def test_chunks_of_the_feed_forward_part():
    for kind in ("bert", "distilbert", "albert"):
        made = model(kind, chunk_size_feed_forward=3)
        plain = states(made, kind)
        for one, other in zip(states(fastffn.patch(made), kind), plain, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


class TwoTowers(nn.Module):
    """Holds encoders that are not its base."""

    def __init__(self):
        super().__init__()
        self.query, self.text = model("bert", "ForSequenceClassification"), model("distilbert")


def test_encoders_inside_of_something_else():
    towers = fastffn.patch(TwoTowers())
    patched = [m for m in towers.modules() if isinstance(m, seams.Patched)]
    assert len(patched) == 3 * LAYERS + LAYERS
    fastffn.unpatch(towers)
    assert not any(isinstance(m, seams.Patched) for m in towers.modules())


def test_encoders_of_fastffn_stay_as_they_are():
    made = model("efficientbert")
    before = anatomy(made)
    assert anatomy(fastffn.patch(made)) == before


def test_what_is_not_known_is_refused_with_a_list():
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)
    for made in (transformers.GPT2Model(config), nn.Linear(2, 2)):
        before = anatomy(made)
        with pytest.raises(UserError, match=r"has no encoder .*: known are albert, bert, .*, vit"):
            fastffn.patch(made)
        assert anatomy(made) == before


def test_a_layer_of_another_make_is_refused_and_nothing_is_changed():
    class MyOutput(transformers.models.bert.modeling_bert.BertOutput):
        def forward(self, hidden_states, input_tensor):
            return super().forward(hidden_states, input_tensor) * 2

    made = model("bert")
    made.encoder.layer[-1].output.__class__ = MyOutput
    before = anatomy(made)
    with pytest.raises(UserError, match="MyOutput has a forward that is not of transformers"):
        fastffn.patch(made)
    assert anatomy(made) == before
    del made.encoder.layer[-1].output.dense
    with pytest.raises(UserError, match=r"BertLayer has no output.dense"):
        fastffn.patch(made)
    assert anatomy(made).keys() <= before.keys()


def test_a_replica_does_not_compute_with_the_originals_weights():
    layer = first_layer(fastffn.patch(model("bert")))
    x = torch.randn(2, 3, WIDTH)
    assert layer.intermediate._fastffn_pair.joins(layer.intermediate, x)
    replica = layer.intermediate._replicate_for_data_parallel()
    assert not replica._fastffn_pair.joins(replica, x)


def calls_of(model, rows, training=False):
    made = fastffn.patch(without_dropout(model)) if training else fastffn.patch(model)
    ids = torch.randint(4, 60, (1, rows))
    with torch.set_grad_enabled(training), counted() as calls:
        made(ids)
    return calls


def test_ops_serve_where_they_are_faster(sizes, monkeypatch):
    """On a processor whose float32 products are ours; the figures are in `worthwhile`."""
    monkeypatch.setattr(seams.worthwhile.matmul, "is_onednns", lambda dtype: dtype == torch.float32)
    wide = {"hidden_size": 512, "max_position_embeddings": 512}
    made = model("bert", **wide)
    assert calls_of(made, 32) == {}
    assert calls_of(made, 64) == {"ffn": LAYERS}
    assert calls_of(made, 256) == {"ffn": LAYERS, "norm": LAYERS}
    assert calls_of(made, 256, training=True) == {"ffn": LAYERS}
    assert calls_of(made.bfloat16().eval(), 256) == {"norm": 2 * LAYERS}
    fastffn.patch(made, recompute="all")
    with counted() as calls:
        made(torch.randint(4, 60, (1, 32)))
    assert calls == {"ffn": LAYERS}
    assert calls_of(model("bert", hidden_act="gelu_new", **wide), 32) == {"ffn": LAYERS}
    monkeypatch.setattr(seams.worthwhile.matmul, "is_onednns", lambda dtype: False)
    assert calls_of(model("bert", **wide), 256) == {"norm": 2 * LAYERS}


def test_the_choice_compiles(sizes):
    """At lengths on both sides of a threshold, with lengths that the graph leaves open."""
    torch._dynamo.reset()
    made = fastffn.patch(without_dropout(model("bert", attention="sdpa", num_hidden_layers=1)))
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for texts in (1, 4, 8):
        ids = torch.randint(4, 60, (texts, 16))
        torch.testing.assert_close(compiled(ids)[0], made(ids)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["modernbert", "vit", "bert"])
def test_products_by_another_library(kind, sizes, monkeypatch):
    made = model(kind)
    plain = states(made, kind)
    used = mock.Mock(wraps=seams.linear)
    monkeypatch.setattr(seams, "linear", used)
    for faster in (True, False):
        monkeypatch.setattr(seams.worthwhile, "faster_products", lambda x, faster=faster: faster)
        used.reset_mock()
        for one, other in zip(states(fastffn.patch(made), kind), plain, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        assert used.call_count == (2 * LAYERS if faster and kind in PRE_NORM else 0)
        made(**inputs(kind))  # with gradients
        assert used.call_count == (2 * LAYERS if faster and kind in PRE_NORM else 0)


def test_a_portable_graph_has_torchs_operations(sizes):
    made = model("bert", hidden_act="gelu_new")
    with backend.portable(), counted() as calls:
        states(fastffn.patch(made), "bert")
    assert calls == {}
    ids = inputs("bert")["input_ids"]
    exported = torch.export.export(made, (ids,), strict=False)
    assert not [n for n in exported.graph.nodes if "fastffn" in str(n.target)]
    torch.testing.assert_close(exported.module()(ids)[0], made(ids)[0], atol=1e-5, rtol=1e-4)
