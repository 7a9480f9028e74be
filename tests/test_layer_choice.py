"""Which layers are compared: the papers' choices as indices."""

import pytest
import transformers
from encoders import LAYERS, batch, encoder

import fastffn
from fastffn.errors import UserError


def test_relation_layers_of_the_paper():
    assert fastffn.relation_layer(transformers.BertConfig()) == 11
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    assert fastffn.relation_layer(transformers.BertConfig(**large)) == 20
    assert fastffn.relation_layer(transformers.RobertaConfig(**large)) == 18
    assert fastffn.relation_layer(transformers.XLMRobertaConfig(**large)) == 18
    assert fastffn.relation_layer(transformers.DistilBertConfig()) == 5
    model = encoder("electra", "ForMaskedLM")
    assert fastffn.relation_layer(model) == LAYERS - 1
    with fastffn.capture(model, fastffn.relation_layer(model), "q"):
        model(**batch())
    with pytest.raises(UserError, match=r"names no layer for electra with 24 .* 21 and 22"):
        fastffn.relation_layer(transformers.ElectraConfig(num_hidden_layers=24))
    with pytest.raises(UserError, match="str has no num_hidden_layers"):
        fastffn.relation_layer("bert-base-uncased")


def test_layer_maps():
    def teachers(*args):
        pairs = fastffn.layer_map(*args)
        assert [student for student, _ in pairs] == list(range(args[0]))
        return [teacher for _, teacher in pairs]

    assert teachers(6, 12) == [1, 3, 5, 7, 9, 11]
    assert teachers(4, 6) == [0, 2, 3, 5]
    assert teachers(5, 12) == [1, 3, 6, 8, 11]
    assert teachers(3, 3) == [0, 1, 2] and teachers(1, 7) == [6]
    assert teachers(6, 12, "last") == [6, 7, 8, 9, 10, 11]
    assert teachers(4, 6, "first") == [0, 1, 2, 3]
    for student in range(1, 13):
        for teacher in range(student, 25):
            ends = teachers(student, teacher)
            assert len(set(ends)) == student and ends[-1] == teacher - 1
            runs = [b - a for a, b in zip([-1, *ends], ends, strict=False)]
            assert max(runs) - min(runs) <= 1
    for numbers in ((0, 3), (4, 3)):
        with pytest.raises(UserError, match="cannot follow"):
            fastffn.layer_map(*numbers)
    with pytest.raises(UserError, match="'skip' is unknown"):
        fastffn.layer_map(2, 4, "skip")
