"""YAML as plain values that remember their lines.

`parse` gives what a recipe may hold (mappings, lists, text, numbers, true, false, null) and where
each value stands, so that an error found much later names the line.

Why not `yaml.safe_load`: it forgets the lines, lets a second key of the same name win in silence,
and follows YAML 1.1, where `no` is false, `1:30` is 90 and `1e-4` is text. Here scalars follow the
core schema of YAML 1.2. Aliases are refused: a few lines of them make a document of any size.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from fastffn.errors import UserError

Path_ = tuple[str | int, ...]  # of keys, from the top: ("stages", "gd", "losses")

_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$")
_SCALARS = {  # type: what it looks like, what it may begin with
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "int": (re.compile(r"[-+]?[0-9]+$"), "-+0123456789"),
    "float": (_FLOAT, "-+.0123456789"),
    "null": (re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
}
_READ = {
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": float,
    "null": lambda text: None,
    "str": str,
}
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Composes nodes by the core schema; constructs nothing."""

    yaml_implicit_resolvers = {}

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="an alias: write the value out", problem_mark=mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""

    def ignore_aliases(self, data):
        return True


for _kind, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _kind, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_TAG + _kind, _pattern, list(_first))


class Places:
    """Where values stand: `places.of(path)` is "recipe.yaml:17", or the override that set it."""

    def __init__(self, origin: str):
        self.origin = origin
        self._found: dict[Path_, str] = {}

    def of(self, path: Path_) -> str:
        """The place of a value, or of the closest one above it that has a place."""
        for end in range(len(path), 0, -1):
            if path[:end] in self._found:
                return self._found[path[:end]]
        return self.origin

    def put(self, path: Path_, place: str) -> None:
        """Says where a value and all below it stand."""
        self._found = {known: at for known, at in self._found.items() if known[: len(path)] != path}
        self._found[path] = place

    def add(self, path: Path_, place: str) -> None:
        """Says where one value stands, of those below it nothing."""
        self._found[path] = place

    def include(self, path: Path_, other: "Places") -> None:
        """Says that what stands at a path is another file's whole value."""
        self.put(path, other.origin)
        self._found |= {path + below: place for below, place in other._found.items()}

    def move(self, old: Path_, new: Path_) -> None:
        """Renames a path and all below it."""
        size = len(old)
        self._found = {
            (new + path[size:] if path[:size] == old else path): at
            for path, at in self._found.items()
        }


def parse(text: str, origin: str, with_lines: bool = True) -> tuple[Any, Places]:
    """The value that a YAML text holds.

    Args:
        text: one YAML document.
        origin: what errors call it, such as a file's name.
        with_lines: places are "origin:line"; without, `origin` alone.

    Returns:
        The value, and the places of all values in mappings and lists.

    Raises:
        UserError: no YAML, two documents, a key twice, an alias, or a type other than those above.
    """
    places = Places(origin)

    def at(node_or_mark) -> str:
        mark = getattr(node_or_mark, "start_mark", node_or_mark)
        return f"{origin}:{mark.line + 1}" if with_lines and mark is not None else origin

    def value_of(node: yaml.Node, path: Path_) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            found: dict[str, Any] = {}
            for key_node, child in node.value:
                # A key is text, whatever it looks like: a label may be called 1.
                if not isinstance(key_node, yaml.ScalarNode):
                    raise UserError(f"{at(key_node)}: a key must be text")
                key = key_node.value
                if key in found:
                    raise UserError(f"{at(key_node)}: {key} is there twice: remove one")
                places.add((*path, key), at(key_node))
                found[key] = value_of(child, (*path, key))
            return found
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            for index, child in enumerate(node.value):
                places.add((*path, index), at(child))
            return [value_of(child, (*path, index)) for index, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and kind in _READ:
            return _scalar(kind, node.value, at(node))
        raise UserError(f"{at(node)}: the tag {node.tag} is not allowed: write a plain value")

    try:
        node = yaml.compose(text, Loader=_Loader)
        return (None if node is None else value_of(node, ())), places
    except yaml.MarkedYAMLError as error:
        said = " ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"{at(error.problem_mark)}: no YAML: {said}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: no YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{origin}: no YAML that can be read: it is nested too deeply") from None


def _scalar(kind: str, text: str, place: str) -> Any:
    try:
        return _READ[kind](text)
    except ValueError:  # an explicit tag: !!int three
        raise UserError(f"{place}: {text!r} is no {kind}") from None


def parse_file(path: Path) -> tuple[Any, Places]:
    """`parse` of a UTF-8 file; places are "name.yaml:line" with the path as it was given."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): convert it") from None
    return parse(text, str(path))


def dump(value: Any) -> str:
    """The YAML text of plain values; `parse` gives them back."""
    form = {"sort_keys": False, "allow_unicode": True, "width": 100, "default_flow_style": None}
    return yaml.dump(value, Dumper=_Dumper, **form)
