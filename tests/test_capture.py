"""Capture: what it reads is what attention reads, in every encoder that it knows, and no more."""

import pytest
import torch
import transformers
from encoders import HEADS, KNOWN, LAYERS, WIDTH, batch, config, encoder

from fastffn import capture
from fastffn.errors import UserError
from fastffn.models.architectures import ARCHITECTURES, Encoder, find

PARTIAL = {"mpnet", "deberta-v2"}  # scores are more than q k^T
EAGER_ONLY = {*PARTIAL, "megatron-bert"}
# What stands between a layer's input and its projections, where anything does.
NORMS = {
    "megatron-bert": "attention.ln",
    "modernbert": "attn_norm",
    "roberta-prelayernorm": "attention.LayerNorm",
    "xlm-roberta-xl": "attention.self_attn_layer_norm",
}


def projected(model, kind, number, hidden):
    """q, k, v of a layer by hand, from its input."""
    base = model.base_model
    layer = find(base, ARCHITECTURES[kind].layers)[number]
    hidden = find(layer, NORMS[kind])(hidden) if kind in NORMS else hidden
    if kind == "modernbert":
        out = layer.attn.Wqkv(hidden)
        return out[..., :WIDTH], out[..., WIDTH : 2 * WIDTH], out[..., 2 * WIDTH :]
    names = {
        "distilbert": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "mpnet": ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        "efficientbert": ("attention.query", "attention.key", "attention.value"),
        "deberta-v2": tuple(f"attention.self.{x}_proj" for x in ("query", "key", "value")),
    }.get(kind, tuple(f"attention.self.{x}" for x in ("query", "key", "value")))
    return tuple(find(layer, name)(hidden) for name in names)


def hooks(model):
    """Everything that a capture may have left behind, module by module."""
    return {
        name: (
            type(module),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            sorted(module.__dict__),
            list(module._modules),
        )
        for name, module in model.named_modules()
    }


def calls(model):
    """A list that grows by a layer's number whenever it runs."""
    ran = []
    for number, layer in enumerate(Encoder(model).layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    return ran


@pytest.fixture(scope="module", params=KNOWN)
def known(request):
    """(kind, model, all hidden states, captures of all layers)."""
    model = encoder(request.param)
    before = hooks(model)
    what = ("q", "k", "v", "hidden", "embeddings")
    with capture(model, range(LAYERS), what, rotary="before") as states:
        model(**batch())
    assert hooks(model) == before
    hidden = model(**batch(), output_hidden_states=True).hidden_states
    return request.param, model, hidden, states


def test_every_known_architecture_is_tested():
    assert set(KNOWN) == set(ARCHITECTURES)


def test_projections_are_those_of_the_layers_input(known):
    kind, model, hidden, states = known
    assert list(states) == [*range(LAYERS), "embeddings"]
    for number in range(LAYERS):
        expected = projected(model, kind, number, hidden[number])
        for name, tensor in zip("qkv", expected, strict=True):
            assert states[number][name].shape == (2, 9, WIDTH)
            torch.testing.assert_close(states[number][name], tensor, atol=1e-5, rtol=1e-5)


def test_hidden_states_are_what_the_next_layer_gets(known):
    kind, model, hidden, states = known
    torch.testing.assert_close(states["embeddings"], hidden[0])
    for number in range(LAYERS - 1):
        torch.testing.assert_close(states[number]["hidden"], hidden[number + 1])
    last = states[LAYERS - 1]["hidden"]
    if kind == "modernbert":
        last = model.final_norm(last)
    elif kind in ("megatron-bert", "xlm-roberta-xl", "roberta-prelayernorm"):
        norms = {"megatron-bert": "encoder.ln", "xlm-roberta-xl": "encoder.LayerNorm"}
        last = find(model, norms.get(kind, "LayerNorm"))(last)
    torch.testing.assert_close(last, hidden[-1])


def test_one_layer_is_a_plain_dict(known):
    _, model, _, states = known
    with capture(model, -2, ("k", "hidden", "embeddings"), rotary="before") as single:
        model(**batch())
    assert set(single) == {"k", "hidden", "embeddings"}
    assert torch.equal(single["k"], states[LAYERS - 2]["k"])
    assert torch.equal(single["embeddings"], states["embeddings"])


def test_scores_give_the_models_own_probabilities(known):
    """Eager attention shows its maps; layers whose scores are more than q k^T are refused."""
    kind, model, _, _ = known
    inputs = batch()
    if kind in PARTIAL:
        with pytest.raises(UserError, match=r"scores of .* cannot be captured: .*position"):
            capture(model, 0, "scores").__enter__()
        return
    numbers = (0, 2) if kind == "modernbert" else range(LAYERS)
    with capture(model, numbers, "scores", rotary="before") as states:
        maps = model(**inputs, output_attentions=True).attentions
    hidden = inputs["attention_mask"][:, None, None, :] == 0
    for number in numbers:
        q, k, heads = states[number]["scores"]
        assert heads == HEADS
        q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
        scores = q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        expected = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        assert maps[number].max() > 0.4  # far from uniform
        torch.testing.assert_close(expected, maps[number], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KNOWN if kind not in EAGER_ONLY])
def test_the_attention_implementation_changes_nothing(kind):
    captured = []
    for attention in ("eager", "sdpa"):
        model = encoder(kind, attention=attention)
        assert model.config._attn_implementation == attention
        with capture(model, (0, 1, 2)) as states:
            model(**batch())
        captured.append(states)
    real = batch()["attention_mask"].bool()  # what padding holds is not defined
    for number in range(LAYERS):
        for name, tensor in captured[0][number].items():
            torch.testing.assert_close(tensor[real], captured[1][number][name][real])


def test_flash_attention_sees_padded_batches():
    """A stand-in with flash's mask [batch, length] and layout; it unpads inside, not the model."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    masks = []

    def attend(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask.shape)
        whole = attention_mask[:, None, None, :].bool().expand(-1, -1, query.shape[2], -1)
        return sdpa_attention_forward(module, query, key, value, whole, **kwargs)

    transformers.AttentionInterface.register("padded_stand_in", attend)
    AttentionMaskInterface.register("padded_stand_in", flash_attention_mask)
    inputs = batch(length=5, shortest=3)
    states = []
    for attention in ("padded_stand_in", "eager"):
        model = encoder("modernbert", attention=attention)
        with capture(model, 2) as found:
            model(**inputs)
        states.append(found)
    assert masks == [torch.Size((2, 5))] * LAYERS
    real = inputs["attention_mask"].bool()
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor[real], states[1][name][real])


def test_rotation_before_and_after():
    model = encoder("modernbert")
    states = {}
    for rotary in ("before", "after"):
        with capture(model, 2, ("q", "k", "v", "scores"), rotary=rotary) as states[rotary]:
            model(**batch())
    before, after = states["before"], states["after"]
    assert torch.equal(before["v"], after["v"])
    assert torch.equal(before["scores"].q, after["scores"].q)  # these are rotated always
    for name in "qk":
        assert torch.equal(after[name], getattr(after["scores"], name))
        assert torch.equal(before[name][:, 0], after[name][:, 0])  # position 0 is not turned
        assert not torch.allclose(before[name][:, 1:], after[name][:, 1:], atol=1e-2)
        torch.testing.assert_close(before[name].norm(dim=-1), after[name].norm(dim=-1))
    with capture(model, 2) as default:
        model(**batch())
    assert torch.equal(default["q"], after["q"])
    plain = encoder("bert")
    for rotary in ("before", "after"):
        with capture(plain, 2, "q", rotary=rotary) as states[rotary]:
            plain(**batch())
    assert torch.equal(states["before"]["q"], states["after"]["q"])


# -- stopping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("head", ["", "ForMaskedLM"])
def test_a_teacher_stops_after_the_last_layer_that_is_read(kind, head):
    model = encoder(kind, head)
    ran, before, weights = calls(model), hooks(model), list(model.state_dict())
    with torch.inference_mode():
        with capture(model, (0, 1), ("q", "hidden", "embeddings")) as whole:
            model(**batch())
        assert ran == [0, 1, 2]
        ran.clear()
        with capture(model, (1, 0), ("q", "hidden", "embeddings"), stop=True) as states:
            model(**batch())
            assert list(model.state_dict()) == weights
    assert ran == [0, 1]
    for number in (0, 1):
        for name in ("q", "hidden"):
            assert torch.equal(states[number][name], whole[number][name])
    assert torch.equal(states["embeddings"], whole["embeddings"])
    assert hooks(model) == before
    ran.clear()
    model(**batch())
    assert ran == [0, 1, 2]


@pytest.mark.parametrize("kind", KNOWN)
def test_embeddings_need_one_layer_at_most(kind):
    model = encoder(kind)
    ran = calls(model)
    with capture(model, what="embeddings", stop=True) as states:
        model(**batch())
    assert ran == [0] and set(states) == {"embeddings"}


def test_what_a_stopped_model_returns():
    model = encoder("bert")
    hidden = model(**batch(), output_hidden_states=True).hidden_states
    with capture(model, 1, "hidden", stop=True) as states:
        output = model(**batch(), output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, states["hidden"])
    assert len(output.hidden_states) == 3 and torch.equal(output.last_hidden_state, hidden[2])


def test_hidden_states_are_all_there_after_a_stopped_first_call():
    """transformers installs its recorders at the first call that asks for hidden states."""
    model = encoder("bert")
    with capture(model, 0, stop=True):
        model(**batch(), output_hidden_states=True)
    assert len(model(**batch(), output_hidden_states=True).hidden_states) == LAYERS + 1


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_an_exception_leaves_the_model_as_it_was(kind):
    model = encoder(kind)
    before = hooks(model)
    with pytest.raises(ZeroDivisionError), capture(model, 0, stop=True):
        model(**batch())
        raise ZeroDivisionError
    assert hooks(model) == before
    with pytest.raises(UserError, match="run the model"), capture(model, 0, stop=True):
        pass
    assert hooks(model) == before


def test_captures_of_one_model_nest():
    model = encoder("roberta")
    before, ran = hooks(encoder("roberta")), calls(model)
    with capture(model, 1, stop=True) as outer:
        with capture(model, 0, "q", stop=True) as inner:
            with pytest.raises(UserError, match="layer 2 does not run"):
                capture(model, -1).__enter__()
            model(**batch())
            assert ran == [0] and "q" in inner and not outer
        model(**batch())
    assert ran == [0, 0, 1] and set(outer) == {"q", "k", "v", "hidden"}
    for layer in Encoder(model).layers:
        layer._forward_hooks.clear()
    assert hooks(model) == before


# -- what is refused -----------------------------------------------------------------------------


def test_an_architecture_without_a_row_is_refused():
    """ALBERT shares its layers; Longformer has BERT's names and another layout."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 60, "intermediate_size": 32}
    for cls in (transformers.AlbertConfig, transformers.LongformerConfig):
        model = transformers.AutoModel.from_config(cls(**sizes))
        with pytest.raises(UserError, match=r"no BERT-like encoder .* bert, camembert, .*xlm-rob"):
            capture(model).__enter__()


def test_a_class_of_ones_own_is_told_by_its_attributes():
    class Config(transformers.BertConfig):
        model_type = "homemade"

    class Model(transformers.BertModel):
        config_class = Config

    model = Model(Config(**{**config("bert").to_dict(), "model_type": "homemade"})).eval()
    with capture(model, 1) as states:
        hidden = model(**batch(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(states["q"], projected(model, "bert", 1, hidden[1])[0])
    with pytest.raises(UserError, match="its class is not known"):
        capture(model, 1, "scores").__enter__()


def test_refused_scores():
    decoder = encoder("bert", is_decoder=True)
    with pytest.raises(UserError, match="is a decoder"):
        capture(decoder, 0, "scores").__enter__()
    with pytest.raises(UserError, match=r"layer 1 sees a window .* layers 0, 2 see all"):
        capture(encoder("modernbert"), (0, 1), "scores").__enter__()


def test_refused_arguments():
    model = encoder("bert")
    for layer, message in [
        (3, "layer 3 does not exist: the encoder has 3 layers"),
        ((0, -4), "layer -4 does not exist"),
        ((0, "1"), "layer 1 does not exist"),
        ("last", "neither a number nor a sequence"),
        (1.0, "neither a number nor a sequence"),
        ((), "no layer to capture"),
    ]:
        with pytest.raises(UserError, match=message):
            capture(model, layer).__enter__()
    with pytest.raises(UserError, match=r"cannot capture \['maps'\]: choose among"):
        capture(model, what=("q", "maps")).__enter__()
    with pytest.raises(UserError, match="rotary 'none' is unknown"):
        capture(model, rotary="none").__enter__()
    with pytest.raises(UserError, match=r"no \['embeddings'\] passed layer 0"):
        with capture(model, what="embeddings"):
            pass
    with pytest.raises(UserError, match="'v' was not captured"), capture(model, what="q") as states:
        model(**batch())
        states["v"]


def test_activations_without_padding_are_refused():
    model = encoder("bert")
    layer = model.encoder.layer[0]
    with pytest.raises(UserError, match=r"activations as \[7, 32\]"), capture(model, 0, "hidden"):
        layer.register_forward_hook(lambda *_: torch.zeros(7, WIDTH), prepend=True)
        layer(torch.zeros(1, 2, WIDTH))
