"""EfficientBERT models as Hugging Face models: sizes, files, Auto classes, training, masks."""

import json
import subprocess
import sys

import pytest
import torch

from fastffn.errors import UserError
from fastffn.expr import PUBLISHED, Gene

pytest.importorskip("transformers")

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from fastffn.layers import ElasticFFN
from fastffn.models import (
    EfficientBertConfig,
    EfficientBertForMaskedLM,
    EfficientBertForQuestionAnswering,
    EfficientBertForSequenceClassification,
    EfficientBertForTokenClassification,
    EfficientBertModel,
)

GENES = ["2x1/2 tanh(down(gelu(up(x))))", "1x1/3 down(relu(mul(up(max(x, tanh(x))), x)))"]


def tiny(**changes):
    values = {
        "vocab_size": 40,
        "hidden_size": 18,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "genes": GENES,
        "embedding_size": 8,
        "max_position_embeddings": 16,
    }
    return EfficientBertConfig(**(values | changes))


def tokens(rows=3, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 40, (rows, length), generator=generator)


@pytest.mark.parametrize(
    "name, changes, expected",
    [
        ("base", {}, 15.322),
        ("tiny", {}, 9.098),
        ("++", {}, 13.965),
        (  # the authors' size table: 540-wide FFNs at hidden size 360
            "++",
            {"genes": [str(g.with_(ratio=g.ratio * 3 / 2)) for g in PUBLISHED for _ in "ab"]},
            15.695,
        ),
    ],
)
def test_parameter_count(name, changes, expected):
    with torch.device("meta"):
        model = EfficientBertModel(EfficientBertConfig.preset(name, **changes))
    assert round(model.num_parameters() / 1e6, 3) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trigram": False},
        {"trigram": False, "embedding_size": None, "sentence_pooling": "mean"},
        {"supernet": {"max_stack": 3, "max_width": 18, "gated": True}},
    ],
    ids=["trigram", "factorised", "plain", "supernet"],
)
@pytest.mark.parametrize(
    "model_class, auto",
    [
        (EfficientBertModel, AutoModel),
        (EfficientBertForMaskedLM, AutoModelForMaskedLM),
        (EfficientBertForSequenceClassification, AutoModelForSequenceClassification),
        (EfficientBertForQuestionAnswering, AutoModelForQuestionAnswering),
        (EfficientBertForTokenClassification, AutoModelForTokenClassification),
    ],
)
def test_round_trip(model_class, auto, changes, tmp_path):
    torch.manual_seed(0)
    model = model_class(tiny(**changes)).eval()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        "config.json",
        "model.safetensors",
    ]
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    state = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(model(tokens())[0], loaded(tokens())[0])
    assert json.loads((tmp_path / "config.json").read_text())["genes"] == GENES
    assert AutoConfig.from_pretrained(tmp_path).genes == GENES


def test_import_is_lazy():
    code = "import sys, fastffn, fastffn.layers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tied_decoder():
    model = EfficientBertForMaskedLM(tiny())
    assert model.head.decoder.weight is model.efficientbert.embeddings.word_embeddings.weight
    model.resize_token_embeddings(45)
    assert model(tokens()).logits.shape == (3, 7, 45)


@pytest.mark.parametrize("trigram", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_changes_nothing(trigram, attention):
    model = EfficientBertModel(tiny(trigram=trigram, sentence_pooling="mean")).eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():  # as after training with a tied decoder: padding has an embedding
        model.embeddings.word_embeddings.weight[0] = 1.0
    ids = tokens(2, 6)
    alone = model(ids)
    padded = torch.cat((ids, torch.zeros(2, 3, dtype=torch.long)), 1)
    mask = (torch.arange(9) < 6).long().expand(2, -1)
    batch = model(padded, attention_mask=mask)
    torch.testing.assert_close(batch.last_hidden_state[:, :6], alone.last_hidden_state)
    torch.testing.assert_close(batch.pooler_output, alone.pooler_output)


def test_trigram_sees_neighbours_in_order():
    """Embeddings with one hot digit each and an identity projection show what stands where."""
    model = EfficientBertModel(tiny(hidden_size=24, genes=GENES)).eval()
    embeddings = model.embeddings
    seen = []
    with torch.no_grad():
        embeddings.word_embeddings.weight.copy_(torch.arange(40.0)[:, None].expand(-1, 8))
        embeddings.projection.weight.copy_(torch.eye(24))
        embeddings.projection.bias.zero_()
    embeddings.projection.register_forward_hook(lambda m, i, output: seen.append(output))
    model(torch.tensor([[5, 6, 7, 9]]), attention_mask=torch.tensor([[1, 1, 1, 0]]))
    assert seen[0][0, :, ::8].tolist() == [[0, 5, 6], [5, 6, 7], [6, 7, 0], [7, 0, 0]]


def test_recorded_outputs():
    model = EfficientBertModel(tiny()).eval()
    plain = model(tokens())
    full = model(tokens(), output_hidden_states=True, output_attentions=True)
    assert plain.hidden_states is None and plain.attentions is None
    assert [state.shape for state in full.hidden_states] == [(3, 7, 18)] * 3
    assert [map_.shape for map_ in full.attentions] == [(3, 3, 7, 7)] * 2
    torch.testing.assert_close(full.attentions[0].sum(-1), torch.ones(3, 3, 7))
    torch.testing.assert_close(full.last_hidden_state, plain.last_hidden_state)
    assert isinstance(model(tokens(), return_dict=False), tuple)


def descend(model, steps=12, **inputs):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_masked_lm_learns():
    torch.manual_seed(0)
    ids = tokens()
    labels = ids.clone()
    labels[:, ::2] = -100
    losses = descend(EfficientBertForMaskedLM(tiny()), input_ids=ids, labels=labels)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    "count, labels, problem",
    [
        (3, torch.tensor([0, 2, 1]), "single_label_classification"),
        (1, torch.tensor([0.5, -1.0, 2.0]), "regression"),
        (2, torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]), "multi_label_classification"),
    ],
)
def test_classification_learns(count, labels, problem):
    torch.manual_seed(0)
    model = EfficientBertForSequenceClassification(tiny(num_labels=count))
    losses = descend(model, input_ids=tokens(), labels=labels)
    assert losses[-1] < losses[0]
    assert model.config.problem_type == problem


def test_token_classification_learns():
    torch.manual_seed(0)
    model = EfficientBertForTokenClassification(tiny(num_labels=3))
    labels = tokens() % 3
    labels[:, ::2] = -100
    losses = descend(model, input_ids=tokens(), labels=labels)
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    output = model(tokens(), labels=labels)
    chosen = output.logits[:, 1::2].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(chosen, labels[:, 1::2].flatten())
    torch.testing.assert_close(output.loss, wanted)
    summed = model(tokens(), labels=labels, num_items_in_batch=2).loss
    torch.testing.assert_close(summed, wanted * (labels != -100).sum() / 2)


def test_question_answering_learns():
    torch.manual_seed(0)
    model = EfficientBertForQuestionAnswering(tiny(num_labels=3))
    inputs = {"input_ids": tokens(), "start_positions": torch.tensor([1, 0, 4])}
    inputs["end_positions"] = torch.tensor([2, 0, 6])
    losses = descend(model, **inputs)
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    output = model(**inputs)
    assert output.start_logits.shape == output.end_logits.shape == (3, 7)
    entropy = torch.nn.functional.cross_entropy
    wanted = entropy(output.start_logits, inputs["start_positions"])
    wanted = (wanted + entropy(output.end_logits, inputs["end_positions"])) / 2
    torch.testing.assert_close(output.loss, wanted)


def test_answers_outside_the_text_count_for_nothing():
    model = EfficientBertForQuestionAnswering(tiny()).eval()
    start, end = torch.tensor([1, 7, 300]), torch.tensor([2, 9, 300])
    output = model(tokens(), start_positions=start, end_positions=end)
    first = model(tokens()[:1], start_positions=start[:1], end_positions=end[:1])
    torch.testing.assert_close(output.loss, first.loss)
    column = model(tokens(), start_positions=start[:, None], end_positions=end[:, None])
    torch.testing.assert_close(output.loss, column.loss)


@pytest.mark.parametrize(
    "model_class", [EfficientBertForQuestionAnswering, EfficientBertForTokenClassification]
)
def test_heads_pass_on_what_is_recorded(model_class):
    model = model_class(tiny()).eval()
    full = model(tokens(), output_hidden_states=True, output_attentions=True)
    assert len(full.hidden_states) == 3 and len(full.attentions) == 2
    assert isinstance(model(tokens(), return_dict=False), tuple)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_gradient_checkpointing():
    def gradients(checkpointed):
        torch.manual_seed(0)
        model = EfficientBertForMaskedLM(tiny()).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model(tokens(), labels=tokens()).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_whole():
    model = EfficientBertModel(tiny(sentence_pooling="mean")).eval()
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, want = compiled(tokens(), attention_mask=mask), model(tokens(), attention_mask=mask)
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state)


def test_published_genes_compile_whole():
    """The tiny preset's functions, every one of them, at a small size and with gradients."""
    torch._dynamo.reset()
    small = {"vocab_size": 40, "hidden_size": 24, "embedding_size": 8}
    still = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    model = EfficientBertModel(EfficientBertConfig.preset("tiny", **small, **still))
    assert model.config.genes == [str(gene) for gene in PUBLISHED]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, want = compiled(tokens()).last_hidden_state, model(tokens()).last_hidden_state
    torch.testing.assert_close(got, want)
    parameters = list(model.encoder.parameters())
    ours = torch.autograd.grad(got.square().sum(), parameters)
    theirs = torch.autograd.grad(want.square().sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_set_genes():
    model = EfficientBertModel(tiny(supernet={"max_stack": 2, "max_width": 18})).eval()
    assert isinstance(model.encoder.layer[0].ffn, ElasticFFN)
    before = model(tokens()).last_hidden_state
    changed = ["1x1 down(gelu(up(x)))", GENES[1]]
    model.set_genes(changed)
    assert model.config.genes == changed
    assert not torch.equal(model(tokens()).last_hidden_state, before)
    with pytest.raises(UserError, match="max_stack"):
        model.set_genes([GENES[0], "3x1 down(gelu(up(x)))"])
    assert str(model.encoder.layer[0].ffn.gene) == changed[0], "a refused change left its mark"
    with pytest.raises(UserError, match="1 given for 2"):
        model.set_genes(changed[:1])
    with pytest.raises(UserError, match="no supernet"):
        EfficientBertModel(tiny()).set_genes(GENES)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"genes": GENES[:1]}, "genes: 1 given for 2 layers"),
        ({"genes": [GENES[0], "1x1 down(gelo(up(x)))"]}, "gelo"),
        ({"genes": [GENES[0], "1x2 down(mul(up(x), x))"]}, "gene"),
        ({"genes": "1x1 down(gelu(up(x)))"}, "genes"),
        ({"genes": None}, "multiple of 6"),
        ({"genes": [Gene.parse(gene) for gene in GENES], "ffn_base": 4}, "base 1, ffn_base is 4"),
        ({"num_attention_heads": 4}, "num_attention_heads: 4 heads do not divide"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"embedding_size": None}, "trigram"),
        ({"embedding_size": 0}, "embedding_size"),
        ({"hidden_dropout_prob": 1}, "hidden_dropout_prob"),
        ({"pad_token_id": 40}, "pad_token_id"),
        ({"sentence_pooling": "max"}, "sentence_pooling"),
        ({"hidden_dropout_prob": "much"}, "hidden_dropout_prob"),
        ({"classifier_dropout": 1.5}, "classifier_dropout"),
        ({"ffn_base": 0}, "ffn_base"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps"),
        ({"recompute": "foo"}, "recompute: expected one of none, activation, all"),
        ({"initializer_range": -1.0}, "initializer_range"),
        ({"initializer_range": float("nan")}, "initializer_range"),
        ({"supernet": {"max_stack": 2}}, "supernet"),
        ({"supernet": 3}, "supernet: expected max_stack, max_width"),
        (
            {"supernet": {"max_stack": 0, "max_width": 0}},
            "supernet: max_stack: expected a positive",
        ),
        (
            {"supernet": {"max_stack": 2, "max_width": 0}},
            "supernet: max_width: expected a positive",
        ),
        ({"supernet": {"max_stack": 1, "max_width": 18}}, "larger max_stack"),
        ({"supernet": {"max_stack": 2, "max_width": 8}}, "larger max_width"),
        (
            {
                "supernet": {"max_stack": 2, "max_width": 18},
                "genes": [GENES[0], "1x1/2 down(mul(swish(gate(x)), up(x)))"],
            },
            "gated=True",
        ),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**changes)


def test_bad_calls():
    with pytest.raises(UserError, match="preset"):
        EfficientBertConfig.preset("huge")
    model = EfficientBertModel(tiny())
    with pytest.raises(UserError, match="17 tokens"):
        model(tokens(1, 17))
    with pytest.raises(UserError, match="input_ids"):
        model()
    pooled = EfficientBertModel(tiny(sentence_pooling="mean"))
    mask = torch.ones(3, 1, 7, 7, dtype=torch.bool)
    with pytest.raises(UserError, match=r"attention_mask: .* needs a mask \[B, T\]"):
        pooled(tokens(), attention_mask=mask)
    assert model(tokens(), attention_mask=mask).last_hidden_state.shape == (3, 7, 18)


@pytest.mark.parametrize("trigram", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_empty_batches(trigram, attention):
    model = EfficientBertModel(tiny(trigram=trigram, sentence_pooling="mean")).eval()
    model.set_attn_implementation(attention)
    for mask in (None, torch.ones(0, 5, dtype=torch.long)):
        output = model(tokens(0, 5), attention_mask=mask)
        assert output.last_hidden_state.shape == (0, 5, 18)
        assert output.pooler_output.shape == (0, 18)
    with pytest.raises(UserError, match="input_ids: texts of 0 tokens"):
        model(tokens(2, 0))
