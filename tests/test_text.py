"""Text: what counts as a sentence, how files become documents, and what is held out."""

import gzip
import lzma
import re

import pytest

from fastffn.data.text import (
    Document,
    _prose_blocks,
    hold_out,
    read_documents,
    split_sentences,
    stdlib_documents,
)
from fastffn.errors import UserError


@pytest.fixture(scope="module")
def stdlib():
    return stdlib_documents()


def sentences(documents):
    return [sentence for document in documents for sentence in document.sentences]


def article(start, count):
    return "\n\n".join(
        f"Sentence number {k} talks about nothing. It has a twin of number {k}."
        for k in range(start, start + count)
    )


def test_split_keeps_abbreviations_and_numbers_together():
    text = 'Use it, e.g. The 3.5 ms\nlimit. "Is it so?" Yes! See fig. 2 by J. Doe (1999.) And on'
    assert split_sentences(text) == [
        "Use it, e.g. The 3.5 ms limit.",
        '"Is it so?"',
        "Yes!",
        "See fig. 2 by J. Doe (1999.)",
        "And on",
    ]


def test_split_knows_cjk_stops():
    assert split_sentences("尽力而为。买且三思！") == ["尽力而为。", "买且三思！"]


def test_docstrings_lose_code_and_markup():
    text = """Return the *largest* of ``values`` by :func:`max`.

    >>> largest([1, 2])
    2

    The order of "values" does
    not matter, see [1].

    largest(values) -> value
      - an item of a list
      - another item
    """
    assert list(_prose_blocks(text)) == [
        "Return the largest of values by max.",
        "The order of values does not matter, see.",
        "an item of a list",
        "another item",
    ]


def test_stdlib_is_large_clean_and_without_repetition(stdlib):
    every = sentences(stdlib)
    assert len(stdlib) > 300
    assert len(every) > 10_000
    assert len(set(every)) == len(every)
    assert {name.split()[0] for name in (d.name for d in stdlib)} == {"topic", "module"}
    assert not [s for s in every if ">>>" in s or "::=" in s or "``" in s or "\n" in s]
    assert all(len(re.findall(r"[^\W_]+", s)) >= 5 for s in every)


def test_stdlib_is_the_same_each_time(stdlib):
    assert stdlib_documents() == stdlib


def test_hold_out_is_by_document_deterministic_and_a_tenth(stdlib):
    train, held = hold_out(stdlib)
    assert sorted(d.name for d in train + held) == sorted(d.name for d in stdlib)
    assert not set(sentences(train)) & set(sentences(held))
    assert len(held) == round(0.1 * len(stdlib))
    backwards = hold_out(stdlib[::-1])[1]
    assert {d.name for d in backwards} == {d.name for d in held}
    assert {d.name for d in hold_out(stdlib, seed=1)[1]} != {d.name for d in held}


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_hold_out_leaves_one_on_each_side(fraction):
    two = [Document("a", ("A sentence.",)), Document("b", ("Another sentence.",))]
    train, held = hold_out(two, fraction)
    assert len(train) == len(held) == 1


def test_hold_out_refuses_what_cannot_be_split():
    with pytest.raises(UserError, match="more text"):
        hold_out([Document("a", ("A sentence.",))])
    with pytest.raises(UserError, match="between 0 and 1"):
        hold_out([Document("a", ()), Document("b", ())], 1.0)


def test_one_file_becomes_several_documents(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(article(0, 100), encoding="utf-8")
    documents = read_documents([path])
    assert len(documents) == 20
    assert sentences(documents) == split_sentences(article(0, 100))
    train, held = hold_out(documents)
    assert len(held) == 2
    assert not set(sentences(train)) & set(sentences(held))


def test_many_files_are_documents_and_compression_does_not_matter(tmp_path):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    for folder in (plain, packed):
        folder.mkdir()
    for k in range(20):
        text = article(10 * k, 10)
        (plain / f"{k}.txt").write_text(text, encoding="utf-8")
        opener, suffix = (gzip.open, "gz") if k % 2 else (lzma.open, "xz")
        with opener(packed / f"{k}.txt.{suffix}", "wt", encoding="utf-8") as file:
            file.write(text)
    documents = read_documents(sorted(plain.iterdir()))
    assert len(documents) == 20
    assert sentences(documents) == sentences(read_documents(sorted(packed.iterdir())))


def test_lines_serve_where_there_are_no_blank_ones(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"Line {k} is long enough" for k in range(300)), encoding="utf-8")
    documents = read_documents([path])
    assert len(documents) == 20
    assert len(sentences(documents)) == 300


def test_articles_are_documents_with_their_titles(tmp_path):
    path = tmp_path / "wiki"
    blocks = [
        f'<doc id="{k}" title="Title {k}">\n{article(50 * k, 50)}\n</doc>\n' for k in range(3)
    ]
    path.write_text("".join(blocks), encoding="utf-8")
    documents = read_documents([path])
    assert [d.name for d in documents] == [f"wiki#Title {k}" for k in range(3)]
    assert "doc" not in " ".join(sentences(documents))


def test_repeated_sentences_count_once(tmp_path):
    path = tmp_path / "notes.txt"
    text = article(0, 100)
    path.write_text(text + "\n\n" + text.upper(), encoding="utf-8")
    assert len(sentences(read_documents([path]))) == 200


def test_bad_files_are_refused_by_name(tmp_path):
    latin, empty, broken = tmp_path / "latin.txt", tmp_path / "empty.txt", tmp_path / "broken.xz"
    latin.write_bytes("caf\xe9".encode("latin-1"))
    empty.touch()
    broken.write_bytes(b"no xz")
    with pytest.raises(UserError, match=r"missing\.txt does not exist"):
        read_documents([tmp_path / "missing.txt"])
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8"):
        read_documents([latin])
    with pytest.raises(UserError, match="0 sentences"):
        read_documents([empty])
    with pytest.raises(UserError, match=r"broken\.xz cannot be read"):
        read_documents([broken])
    with pytest.raises(UserError, match="no text files"):
        read_documents([])
