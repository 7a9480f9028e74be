"""What an optimised encoder refuses, or leaves to torch: nothing is silently another model."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import fastffn  # noqa: E402
from fastffn.errors import UserError  # noqa: E402
from fastffn.ops import backend  # noqa: E402
from fastffn.serve.packed_encoder import PackedEncoder  # noqa: E402
from fastffn.serve.packing import NotPackable  # noqa: E402

pytestmark = pytest.mark.skipif(backend.cpp()[0] is None, reason="csrc is not built")

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 64,
}


def model(kind: str = "Bert", **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    made = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


@pytest.fixture
def ids():
    return torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(1))


def largest_difference(given, made, **batch) -> float:
    with torch.no_grad():
        return (made(**batch)[0] - given(**batch)[0]).abs().max().item()


class Doubled(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **named):
        return 2 * self.module(*inputs, **named)


def own_attention(bert):
    class Mine(type(bert.encoder.layer[1].attention.self)):
        def forward(self, *inputs, **named):
            mixed, weights = super().forward(*inputs, **named)
            return 2 * mixed, weights

    bert.encoder.layer[1].attention.self.__class__ = Mine


def own_embeddings(bert):
    class Mine(type(bert.embeddings)):
        def forward(self, *inputs, **named):
            return 2 * super().forward(*inputs, **named)

    bert.embeddings.__class__ = Mine


def hook(bert):
    bert.encoder.layer[0].register_forward_hook(lambda *_: 2 * _[-1])


def narrow_heads(bert):
    attention = bert.encoder.layer[1].attention
    for name in ("query", "key", "value"):
        setattr(attention.self, name, nn.Linear(32, 16))
    attention.output.dense = nn.Linear(16, 32)
    attention.self.num_attention_heads, attention.self.all_head_size = 2, 16


def wide_heads(bert):
    attention = bert.encoder.layer[1].attention
    for name in ("query", "key", "value"):
        setattr(attention.self, name, nn.Linear(32, 512))
    attention.output.dense = nn.Linear(512, 32)


@pytest.mark.parametrize("change", [own_attention, own_embeddings, hook, narrow_heads, wide_heads])
def test_what_is_not_the_architectures_own_is_not_packed(change):
    bert = model()
    change(bert)
    with pytest.raises(NotPackable):
        PackedEncoder(bert)


@pytest.mark.parametrize("change", [own_attention, own_embeddings, hook, narrow_heads])
def test_and_runs_by_torch_as_it_is(change, ids):
    bert = model()
    change(bert)
    made = fastffn.optimize(bert)
    assert made.report.engine == "torch" and made.report.why
    assert largest_difference(bert, made, input_ids=ids) < 1e-5


def test_a_pooler_may_be_anything(ids):
    bert = model()
    bert.pooler = Doubled(bert.pooler)
    made = PackedEncoder(bert)
    with torch.no_grad():
        torch.testing.assert_close(made(ids).pooler_output, bert(ids).pooler_output)


def test_inputs_elsewhere_are_refused(ids):
    made = PackedEncoder(model())
    with pytest.raises(UserError, match="inputs are on meta"):
        made(ids.to("meta"))
    with pytest.raises(UserError, match="inputs are on meta"):
        made(ids, attention_mask=torch.ones_like(ids, device="meta"))


def test_embeddings_of_any_strides(ids):
    megatron = model("MegatronBert")
    words = torch.randn(1, 32, 9).transpose(1, 2)
    assert largest_difference(megatron, PackedEncoder(megatron), inputs_embeds=words) < 1e-5


def test_task_types_count_and_unknown_arguments_are_refused(ids):
    ernie = model("Ernie", use_task_id=True, task_type_vocab_size=3)
    made = PackedEncoder(ernie)
    batch = {"input_ids": ids, "task_type_ids": torch.full_like(ids, 2)}
    assert largest_difference(ernie, made, **batch) < 1e-5
    with torch.no_grad():
        assert (made(**batch)[0] - made(ids)[0]).abs().max() > 0.01
    with pytest.raises(UserError, match="encoder_hidden_states"):
        made(ids, encoder_hidden_states=torch.zeros(3, 12, 32))
    made(ids, use_cache=False, past_key_values=None)


@pytest.mark.parametrize("name", ["hidden_states", "attentions"])
def test_what_the_configuration_asks_for_is_not_left_out(name, ids):
    bert = model(attn_implementation="eager")
    setattr(bert.config, f"output_{name}", True)
    with pytest.raises(UserError, match=f"output_{name}"):
        PackedEncoder(bert)(ids)


def test_return_dict_of_the_configuration(ids):
    bert = model()
    bert.config.return_dict = False
    assert isinstance(PackedEncoder(bert)(ids), tuple)


def test_a_window_of_nothing_but_the_token(ids):
    marks = {f"{name}_token_id": k for k, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    modern = model("ModernBert", local_attention=1, **marks)
    assert largest_difference(modern, PackedEncoder(modern), input_ids=ids) < 1e-5


def test_positions_by_words_do_not_count_padding():
    roberta = model("Roberta")
    ids = torch.full((2, 64), roberta.config.pad_token_id)
    ids[:, :60] = 7
    mask = (ids != roberta.config.pad_token_id).long()
    made = PackedEncoder(roberta)
    with torch.no_grad():
        got, want = made(ids, mask)[0], roberta(ids, attention_mask=mask)[0]
    torch.testing.assert_close(got[:, :60], want[:, :60], atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="position"):
        made(torch.full((1, 64), 7))


def test_another_instruction_set_than_it_was_packed_for(ids):
    module = backend.cpp()[0]
    if not module.multiplies("bfloat16") or "avx2" not in module.available_isas():
        pytest.skip("needs bfloat16 and another instruction set")
    made, before = PackedEncoder(model(), "bfloat16"), module.isa()
    try:
        module.select_isa("avx2")
        with pytest.raises(UserError, match="optimise the model again"):
            made(ids)
    finally:
        module.select_isa(before)
    made(ids)
