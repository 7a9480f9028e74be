"""Text for distillation: documents, which are named lists of sentences.

A sentence is what the teacher reads at once; a document is what is held out as a whole, because
neighbouring sentences share words and topics: splitting by sentence would judge a student on text
that it has nearly seen.

    stdlib_documents()      the English that every Python has: language topics and docstrings
    read_documents(paths)   the user's own files
    hold_out(documents)     (train, held out), by document

Why not a corpus from the hub: the first run must need no network, and the standard library holds
some 15,000 real sentences. Its docstrings are read with `ast` and never imported.
"""

import ast
import gzip
import hashlib
import lzma
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastffn.errors import UserError


@dataclass(frozen=True)
class Document:
    """A named text, split into sentences."""

    name: str
    sentences: tuple[str, ...]


# -- sentences ---------------------------------------------------------------------------------

# An end of sentence is a full stop before white space and a new start, but not after these.
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|cf|vs|al|approx|resp|incl|fig|sec|no|vol|pp|ed|Mr|Mrs|Ms|Dr|St|Jr|Sr|"
    r"Prof|Inc|Ltd|Co|U\.S|U\.K)|\b[A-Z])\.$"
)
_END = re.compile(r"""[.!?]["')\]]*\s+(?=["'(\[]?[A-Z0-9])|[。！？]["'”’）]*\s*""")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+(?:['’-][^\W_]+)*")  # CJK: one by one


def split_sentences(paragraph: str) -> list[str]:
    """Splits one paragraph at full stops, question and exclamation marks (also the CJK ones)."""
    paragraph = " ".join(paragraph.split())
    sentences, start = [], 0
    for end in _END.finditer(paragraph):
        sentence = paragraph[start : end.end()].rstrip()
        if not _ABBREVIATION.search(sentence):
            sentences.append(sentence)
            start = end.end()
    return [*sentences, paragraph[start:]] if start < len(paragraph) else sentences


class _Collector:
    """Keeps a sentence once in the whole corpus, if its length in words is within the limits."""

    def __init__(self, min_words: int, max_words: int):
        self.min_words, self.max_words = min_words, max_words
        self.seen: set[str] = set()

    def document(self, name: str, paragraphs: Iterable[str]) -> Document:
        kept = []
        for sentence in (s for paragraph in paragraphs for s in split_sentences(paragraph)):
            words = _WORD.findall(sentence)
            key = " ".join(words).casefold()  # copies often differ in quotes and case alone
            if self.min_words <= len(words) <= self.max_words and key not in self.seen:
                self.seen.add(key)
                kept.append(sentence)
        return Document(name, tuple(kept))


# -- the standard library ----------------------------------------------------------------------

_SKIPPED_FOLDERS = {
    "__phello__",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_BULLET = re.compile(r"^\s*(?:[-*+•]|\(?\d+[.)]|[a-z][.)])\s+")
# Marks of code, grammar, tables, signatures and field lists: the whole paragraph or line is none.
_NOT_PROSE = re.compile(
    r">>>|::=|^\s*\.\. |[-=+*~^#_]{4,}|\.{4}|\s\|\s|^\s*[:@]\w+|^\s*[|+]|[{}\\]|[=<>!]=|->|<-|\w=\w"
    r"|^\s*(?:def|class|import|from|with|for|if|while|try|return|raise|assert|print)\b[^.]*:?$"
)
_INLINE = (  # markup that surrounds words, and what remains of it
    (re.compile(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^`>]*>)?`"), r"\1"),
    (re.compile(r"``([^`]*)``|`([^`']*)[`']"), r"\1\2"),
    (re.compile(r"(?<!\w)\*{1,2}(\w[^*]*?)\*{1,2}(?!\w)"), r"\1"),
    (re.compile(r"\s*\[\d+\]"), ""),
    (re.compile(r'"([\w.]+(?:\(\))?)"'), r"\1"),  # the topics put names of things in quotes
)


def _prose_blocks(text: str) -> Iterator[str]:
    """Paragraphs and list items of a docstring or topic that read as prose, without markup."""
    for block in re.split(r"\n\s*\n", text.strip()):
        item: list[str] = []
        indent = None
        for line in [*block.splitlines(), None]:
            starts = line is None or _BULLET.match(line)
            level = None if line is None else len(line) - len(line.lstrip())
            # A deeper or shallower line is another thing: a definition's text, a code example.
            if item and (starts or level != indent):
                yield from _prose(item)
                item = []
            if line is not None:
                text_of_line = _BULLET.sub("", line)
                indent = len(line) - len(text_of_line.lstrip())
                item.append(text_of_line.strip())


def _prose(lines: list[str]) -> Iterator[str]:
    if any(_NOT_PROSE.search(line) for line in lines):
        return
    text = " ".join(lines)
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    yield text


def _is_natural(sentence: str) -> bool:
    """Begins or ends like a sentence and consists mostly of plain words, not names of things."""
    plain = re.findall(r"(?<![\w.])[A-Z]?[a-z]+(?:['’-][a-z]+)*(?![\w(]|\.\w)", sentence)
    return (
        (sentence[0].isupper() or sentence[-1] in ".!?")
        and len(plain) >= 0.75 * len(sentence.split())
        and sentence.count("(") == sentence.count(")")
    )


def _docstrings(path: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes are that file's affair
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text


def stdlib_documents(min_words: int = 5, max_words: int = 60) -> list[Document]:
    """The English of the running Python: its language topics and its docstrings.

    One document for each topic of `pydoc_data.topics` and for each module of the standard
    library (tests, IDLE, installed packages and the like left out), in a fixed order. Doctests,
    code, grammar, tables, signatures and markup are dropped. No sentence occurs twice.

    Raises:
        UserError: this Python carries neither topics nor sources (a stripped installation).
    """
    sources: list[tuple[str, Iterable[str]]] = []
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    sources += [(f"topic {name}", [topics[name]]) for name in sorted(topics)]
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not _SKIPPED_FOLDERS.intersection(parts) and not parts[0].startswith("config-"):
            sources.append((f"module {'.'.join(parts)}", _docstrings(path)))
    collector = _Collector(min_words, max_words)
    documents = []
    for name, texts in sources:
        blocks = (block for text in texts for block in _prose_blocks(text))
        natural = (s for block in blocks for s in split_sentences(block) if _is_natural(s))
        documents.append(collector.document(name, natural))
    documents = [document for document in documents if document.sentences]
    if not documents:
        raise UserError("this Python has no standard library text: give text files instead")
    return documents


# -- the user's text ---------------------------------------------------------------------------

OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_ARTICLE = re.compile(r"^<doc\b[^\n]*>$", re.MULTILINE)
_TITLE = re.compile(r'title="([^"]*)"')
_ENOUGH_DOCUMENTS = 20  # from here on a tenth by whole files is a tenth, nearly


def read_utf8(path: Path, what: str = "text file") -> str:
    """The text of a UTF-8 file (plain, .gz or .xz), without a byte order mark.

    Raises:
        UserError: a missing file, not UTF-8, or unreadable; `what` names it.
    """
    if not path.is_file():
        raise UserError(f"{what} {path} does not exist: give the path of a UTF-8 text file")
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} {path} is not UTF-8 (byte {error.start}): convert it to UTF-8"
        ) from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{what} {path} cannot be read: {error}") from None


def _paragraphs(text: str) -> list[str]:
    """Paragraphs between blank lines; the lines where there are no blank ones."""
    blocks = [block for block in re.split(r"\n[ \t]*\n", text) if block.strip()]
    return blocks if len(blocks) > 1 else [line for line in text.splitlines() if line.strip()]


def _parts(name: str, text: str, count: int) -> Iterator[tuple[str, list[str]]]:
    """Documents of one file: its `<doc>` articles, or else `count` runs of paragraphs."""
    articles = list(_ARTICLE.finditer(text))
    if articles:
        ends = [article.start() for article in articles[1:]] + [len(text)]
        for number, (article, end) in enumerate(zip(articles, ends, strict=True)):
            title = _TITLE.search(article.group())
            body = text[article.end() : end].replace("</doc>", "")
            # A line of such an article is a paragraph.
            yield f"{name}#{title.group(1) if title else number}", body.splitlines()
        return
    paragraphs = _paragraphs(text)
    count = max(1, min(count, len(paragraphs)))
    for k in range(count):
        run = paragraphs[len(paragraphs) * k // count : len(paragraphs) * (k + 1) // count]
        yield (name if count == 1 else f"{name}#{k}"), run


def read_documents(
    paths: Iterable[str | Path], min_words: int = 3, max_words: int = 200, least: int = 200
) -> list[Document]:
    """Reads UTF-8 text files (plain, .gz or .xz) as documents.

    A file is a document. With fewer than 20 files each is cut into runs of paragraphs, so that a
    tenth can be held out by document; paragraphs end at blank lines, or at line ends where there
    are no blank lines. Files of `<doc ... title="...">` articles give one document per article.
    Documents carry the file's name without its folder: moving the files keeps the held-out part.

    Args:
        paths: the files.
        min_words, max_words: limits on a sentence's length (a CJK character is a word).
        least: fewer sentences than this in all are refused.

    Raises:
        UserError: no file, a missing one, not UTF-8, unreadable, or too few sentences.
    """
    paths = [Path(path) for path in paths]
    if not paths:
        raise UserError("no text files given: name at least one UTF-8 text file")
    parts = -(-_ENOUGH_DOCUMENTS // len(paths)) if len(paths) < _ENOUGH_DOCUMENTS else 1
    collector = _Collector(min_words, max_words)
    documents = [
        collector.document(name, run)
        for path in paths
        for name, run in _parts(path.name, read_utf8(path), parts)
    ]
    documents = [document for document in documents if document.sentences]
    count = sum(len(document.sentences) for document in documents)
    if count < least:
        raise UserError(
            f"the text has {count} sentences of {min_words} to {max_words} words, "
            f"at least {least} are needed: give more text"
        )
    return documents


def hold_out(
    documents: list[Document], fraction: float = 0.1, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Splits documents into (train, held out), both in the given order.

    The `fraction` with the smallest hashes of (seed, name) is held out: the choice depends on
    names alone, so that it survives another order, another machine and, for most documents, a
    corpus that grew. Each side gets at least one.

    Raises:
        UserError: fewer than two documents, or a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise UserError(f"held-out fraction {fraction} is not between 0 and 1")
    if len(documents) < 2:
        raise UserError("one document cannot be split in train and held-out text: give more text")

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{seed}:{documents[index].name}".encode()).digest()

    count = min(max(1, round(fraction * len(documents))), len(documents) - 1)
    held = set(sorted(range(len(documents)), key=rank)[:count])
    return (
        [document for k, document in enumerate(documents) if k not in held],
        [document for k, document in enumerate(documents) if k in held],
    )
