"""What kind of student is wanted: its layers, its budget, the space of its FFNs.

The budget counts the student without its word embeddings. What is not FFN is fixed by the chosen
layers; what remains is spent on FFNs. The *plain* student spends all of it on one gelu FFN of equal
width in every layer. Its width sets the scale of the search: widths from a quarter of it to its
double, one unit or two, so that candidates may take from one layer what they give to another.
"""

from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from fastffn.compress.options import Options
from fastffn.distill.layers import layer_map
from fastffn.errors import UserError
from fastffn.evaluate.size import count
from fastffn.expr import Gene, gene_cost
from fastffn.models.initialise import bert_encoder, from_teacher
from fastffn.search.space import Space

LENGTH = 128  # tokens of the sentences for which MACs are counted and latency is measured
RATIO = 3.5  # teacher over student without word embeddings, unless a budget is given
_STACKS = (1, 2)
_FRACTIONS = ("1/4", "1/2", "3/4", "1", "5/4", "3/2", "2")
_LEAST = 0.6  # of what the plain student spends on FFNs: below it candidates are not of its size
_FUNCTION = "down(gelu(up(x)))"


@dataclass(frozen=True)
class Shape:
    """The student's fixed part and the space of the rest.

    Attributes:
        layers: teacher layers that it takes over.
        hidden_size: H.
        width: inner width of the plain FFN that spends the budget.
        space: of its genes; costs are those of the whole student without word embeddings, MACs
            those of a token among `LENGTH`.
    """

    layers: tuple[int, ...]
    hidden_size: int
    width: int
    space: Space

    @property
    def plain(self) -> list[str]:
        return [plain(self.width, self.hidden_size)] * len(self.layers)

    @property
    def max_stack(self) -> int:
        return max(self.space.stacks)

    @property
    def max_width(self) -> int:
        return int(max(self.space.ratios) * self.hidden_size)

    @property
    def layer_map(self) -> tuple[tuple[int, int], ...]:
        """Which student hidden state follows which of the teacher's."""
        return ((0, 0), *((k + 1, layer + 1) for k, layer in enumerate(self.layers)))


def plain(width: int, hidden_size: int) -> str:
    """The gene of one gelu FFN of this width."""
    return f"1x{Fraction(width, hidden_size)} {_FUNCTION}"


def plain_of_size(params: int, rest: int, layers: int, hidden_size: int) -> int:
    """Width of the plain FFN with which a student comes closest to `params` from below."""
    one = gene_cost(Gene.parse(plain(1, hidden_size)), hidden_size).params
    each = gene_cost(Gene.parse(plain(2, hidden_size)), hidden_size).params - one
    return int((params - rest) / layers - (one - each)) // each


def default_layers(number: int) -> tuple[int, ...]:
    """Half of a teacher's layers, the last of each of as many runs: 1, 3, 5 of six.

    Each student layer then ends where a run of the teacher's does. Spreading them from the first
    to the last (0, 2, 5) left all-MiniLM-L6-v2 with a rank correlation of 0.877 where these three
    reached 0.885, after 400 steps of 64 sentences.
    """
    return tuple(teacher for _, teacher in layer_map(max(1, number // 2), number))


def choose(teacher: nn.Module, options: Options) -> Shape:
    """The student's shape for a teacher.

    Raises:
        UserError: a layer that the teacher lacks, an embedding_size that is not below the hidden
            size, or a budget that no student meets (the nearest size is said).
    """
    config = bert_encoder(teacher).config
    hidden, layers = config.hidden_size, chosen_layers(teacher, options)
    fixed, fixed_macs = _fixed(teacher, layers, options.embedding_size)
    budget = options.budget_params
    if budget is None:
        budget = int(count(teacher, 8)["params_without_word_embeddings"] / RATIO)
    smallest = fixed + len(layers) * gene_cost(Gene.parse(plain(4, hidden)), hidden).params
    width = min(plain_of_size(budget, fixed, len(layers), hidden), config.intermediate_size)
    if width < 4:
        raise UserError(
            f"no student meets the budget of {budget:,} parameters: the nearest has {smallest:,} "
            f"(layers {', '.join(map(str, layers))}, word embeddings not counted): allow as many "
            "or choose fewer layers"
        )
    if width >= 64:
        width -= width % 8  # whole vectors
    spent = len(layers) * gene_cost(Gene.parse(plain(width, hidden)), hidden).params
    ratios = {Fraction(max(1, round(width * Fraction(f))), hidden) for f in _FRACTIONS}
    space = Space(
        hidden,
        len(layers),
        stacks=_STACKS,
        ratios=tuple(ratios),
        params=(fixed + int(_LEAST * spent), budget),
        rest_params=fixed,
        rest_macs=fixed_macs,
    )
    return Shape(layers, hidden, width, space)


def _fixed(
    teacher: nn.Module, layers: tuple[int, ...], embedding_size: int | None
) -> tuple[int, int]:
    """What a student has beside FFNs and word embeddings: (parameters, MACs per token)."""
    gene = Gene.parse(plain(1, teacher.config.hidden_size))
    student = from_teacher(teacher, gene, layers, embedding_size)
    length = min(LENGTH, student.config.max_position_embeddings)
    found, ffn = count(student, length), gene_cost(gene, teacher.config.hidden_size)
    params = found["params_without_word_embeddings"] - len(layers) * ffn.params
    return params, found["macs"] // length - len(layers) * ffn.macs


def chosen_layers(teacher: nn.Module, options: Options) -> tuple[int, ...]:
    number = bert_encoder(teacher).config.num_hidden_layers
    layers = options.layers or default_layers(number)
    if layers[-1] >= number:
        raise UserError(f"layers: the teacher has layers 0 to {number - 1}, not {layers[-1]}")
    return layers
