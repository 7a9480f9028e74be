"""Token ids in flat arrays: what batches hold, how text is packed, and what identifies it all."""

import dataclasses

import numpy as np
import pytest
import torch

from fastffn.data.catalogue import Task
from fastffn.data.encode import encode_task, encode_text, tokenizer_digest
from fastffn.data.tasks import Examples
from fastffn.data.text import Document
from fastffn.errors import UserError

transformers = pytest.importorskip("transformers")

WORDS = ["good", "bad", "a", "film", "it", "is", "was", "."]
SINGLE = Task("one", labels=("no", "yes"))
PAIR = Task("two", texts=("a", "b"), kind="regression")


def wordpiece(folder, words=WORDS, cls=transformers.BertTokenizer):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    )
    return cls(str(folder / "vocab.txt"))


@pytest.fixture
def tokenizer(tmp_path):
    return wordpiece(tmp_path / "tokenizer")


@pytest.fixture
def byte_level():
    """As RoBERTa's: spaces belong to tokens, no token types, <s> a </s></s> b </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        ["a good film. it is bad. it was good."] * 3,
        trainers.BpeTrainer(
            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


def test_batches_are_what_the_tokenizer_gives(tokenizer):
    examples = Examples(["good", "a bad film .", "it is", ""], None, [1, 0, 1, 0])
    encoded = encode_task(tokenizer, examples, SINGLE, 16, train=True)
    assert len(encoded) == 4 and encoded.kind == "classification"
    assert encoded.lengths.tolist() == [3, 6, 4, 2] and encoded.lengths.dtype == np.int64
    assert encoded.tokens.dtype == np.int32 and len(encoded.tokens) == 15
    batch = encoded.batch([2, 1])
    wanted = tokenizer(["it is", "a bad film ."], padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch[name], wanted[name]) and batch[name].dtype == torch.int64
    assert torch.equal(batch["labels"], torch.tensor([1, 0]))
    assert torch.equal(batch["index"], torch.tensor([2, 1]))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", "index"}


def test_pairs_are_cut_where_they_are_longest(tokenizer):
    examples = Examples(["a good good good film", "bad"], ["it is", "it was " * 5], [2.5, 0.25])
    encoded = encode_task(tokenizer, examples, PAIR, 8, train=True)
    batch = encoded.batch([0, 1])
    wanted = tokenizer(
        examples.first,
        examples.second,
        truncation="longest_first",
        max_length=8,
        padding=True,
        return_tensors="pt",
    )
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch[name], wanted[name])
    assert batch["token_type_ids"].sum() > 0
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [2.5, 0.25]


def test_many_rows_keep_their_order(tokenizer):
    """More than one call of the tokenizer."""
    texts = [" ".join(WORDS[: 1 + k % 7]) for k in range(2345)]
    encoded = encode_task(
        tokenizer, Examples(texts, None, [k % 2 for k in range(2345)]), SINGLE, 32, train=True
    )
    assert encoded.lengths.tolist() == [3 + k % 7 for k in range(2345)]
    assert encoded.batch([2000])["input_ids"].tolist() == [tokenizer(texts[2000])["input_ids"]]


def test_a_tokenizer_without_token_types(byte_level):
    encoded = encode_task(
        byte_level, Examples(["good", "it is bad"], None, [1, 0]), SINGLE, 16, train=True
    )
    assert encoded.types is None
    batch = encoded.batch([0, 1])
    assert "token_type_ids" not in batch
    assert batch["input_ids"][0, -1] == byte_level.pad_token_id == encoded.pad
    assert batch["input_ids"][0, 0] == byte_level.cls_token_id


def test_fingerprint_covers_what_batches_are_made_of(tokenizer):
    examples = Examples(["good", "a bad film ."], None, [1, 0])
    encoded = encode_task(tokenizer, examples, SINGLE, 16, train=True)
    assert (
        encoded.fingerprint == encode_task(tokenizer, examples, SINGLE, 16, train=False).fingerprint
    )
    prints = {encoded.fingerprint}
    changes = [
        {"tokens": encoded.tokens + 1},
        {"offsets": np.array([0, 4, 9])},
        {"types": None},
        {"labels": np.array([1, 1])},
        {"labels": encoded.labels.astype(np.float32)},
        {"pad": 1},
        {"kind": "text"},
        {"tokenizer": "another"},
    ]
    for change in changes:
        prints.add(dataclasses.replace(encoded, **change).fingerprint)
    assert len(prints) == 1 + len(changes)


def test_tokenizer_digest(tokenizer, tmp_path, byte_level):
    digest = tokenizer_digest(tokenizer)
    tokenizer("warm up", truncation=True, max_length=4)  # whose state is no part of it
    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokenizer_digest(tokenizer) == digest
    assert (
        tokenizer_digest(transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")) == digest
    )
    assert tokenizer_digest(wordpiece(tmp_path / "other")) == digest
    swapped = wordpiece(tmp_path / "swapped", [*WORDS[1::-1], *WORDS[2:]])
    tokenizer.pad_token = "[MASK]"
    others = {tokenizer_digest(other) for other in (swapped, tokenizer, byte_level)}
    assert len(others | {digest}) == 4


@pytest.mark.parametrize("task", [SINGLE, PAIR])
def test_no_room_for_text(tokenizer, task):
    examples = Examples(["good"], ["bad"] if task is PAIR else None, [1])
    with pytest.raises(UserError, match="has no room for text"):
        encode_task(tokenizer, examples, task, 4 if task is PAIR else 2, train=True)
    encoded = encode_task(tokenizer, examples, task, 5 if task is PAIR else 3, train=True)
    assert encoded.lengths.tolist() == [5 if task is PAIR else 3]


def test_padding_is_needed(tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="no padding token"):
        encode_task(tokenizer, Examples(["good"], None, [1]), SINGLE, 8, train=True)


# -- text --------------------------------------------------------------------------------------


def rows_of(encoded, tokenizer):
    batch = encoded.batch(range(len(encoded)))
    return [
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_sentences_are_packed_within_documents(tokenizer):
    documents = [
        Document("one", ("it is a film .", "good .", "it was bad .", "bad")),
        Document("none", ()),
        Document("two", ("good",)),
    ]
    seen = []
    encoded = encode_text(tokenizer, documents, 10, lambda *step: seen.append(step))
    assert rows_of(encoded, tokenizer) == [
        "[CLS] it is a film. good. [SEP]",
        "[CLS] it was bad. bad [SEP]",
        "[CLS] good [SEP]",
    ]
    assert encoded.lengths.tolist() == [9, 7, 3] and encoded.kind == "text"
    assert encoded.labels is None and seen == [(5, 5)]
    batch = encoded.batch([0])
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "index"}
    assert encoded.fingerprint != encode_text(tokenizer, documents, 8).fingerprint


def test_long_sentences_are_cut_and_empty_ones_left_out(tokenizer):
    documents = [Document("one", ("good " * 20, "\u200b", "bad"))]
    assert rows_of(encode_text(tokenizer, documents, 6), tokenizer) == [
        "[CLS] good good good good [SEP]",
        "[CLS] bad [SEP]",
    ]
    full = [Document("one", ("good good", "bad bad") * 2 + ("bad",))]
    assert encode_text(tokenizer, full, 6).lengths.tolist() == [6, 6, 3]
    with pytest.raises(UserError, match="no text to encode"):
        encode_text(tokenizer, [Document("none", ())], 6)
    with pytest.raises(UserError, match="no room"):
        encode_text(tokenizer, documents, 2)


def test_byte_level_sentences_keep_the_space_between_them(byte_level):
    sentences = ("it is bad.", "it was good.", "a film.")
    encoded = encode_text(byte_level, [Document("one", sentences)], 64)
    whole = byte_level(" ".join(sentences))["input_ids"]
    assert encoded.batch([0])["input_ids"].tolist() == [whole]


def test_rows_of_many_documents_cover_all_tokens(tokenizer):
    rng = np.random.default_rng(0)
    documents = [
        Document(
            str(k),
            tuple(
                " ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(rng.integers(0, 90))
            ),
        )
        for k in range(60)
    ]
    encoded = encode_text(tokenizer, documents, 20)
    assert encoded.lengths.max() <= 20 and encoded.lengths.sum() == len(encoded.tokens)
    texts = [" ".join(document.sentences) for document in documents]
    bare = [t for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for t in ids]
    special = np.isin(encoded.tokens, [tokenizer.cls_token_id, tokenizer.sep_token_id])
    assert encoded.tokens[~special].tolist() == bare
    assert special.sum() == 2 * len(encoded)
