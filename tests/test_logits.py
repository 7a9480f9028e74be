"""`soft_cross_entropy` and `vector_cosine` against their formulas."""

import pytest
import torch
from torch.nn import functional as F

from fastffn import UserError
from fastffn.functional import soft_cross_entropy, vector_cosine


def make(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in "st"]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_torchs_cross_entropy(temperature):
    student, teacher = make(6, 5)
    soft = (teacher / temperature).softmax(-1)
    rows = temperature**2 * F.cross_entropy(student / temperature, soft, reduction="none")
    for reduction, want in (("none", rows), ("sum", rows.sum()), ("mean", rows.mean())):
        got = soft_cross_entropy(student, teacher, temperature, reduction=reduction)
        torch.testing.assert_close(got, want)
    by_entry = -(teacher.softmax(-1) * student.log_softmax(-1)).mean()
    torch.testing.assert_close(soft_cross_entropy(student, teacher) / 5, by_entry)


def test_its_gradient_is_that_of_the_divergence_and_keeps_its_size():
    student, teacher = (0.01 * x for x in make(6, 5))
    student.requires_grad_()
    sizes = []
    for temperature in (1.0, 8.0):
        loss = soft_cross_entropy(student, teacher, temperature)
        logs = (student / temperature).log_softmax(-1)
        target = (teacher / temperature).softmax(-1)
        divergence = temperature**2 * F.kl_div(logs, target, reduction="batchmean")
        (got,), (want,) = (torch.autograd.grad(x, student) for x in (loss, divergence))
        torch.testing.assert_close(got, want)
        sizes.append(got.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_gradcheck_with_a_mask():
    student, teacher = make(2, 3, 4)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    assert torch.autograd.gradcheck(
        lambda x: soft_cross_entropy(x, teacher, 2.0, mask), [student.requires_grad_()]
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masked_rows_change_nothing(reduction):
    student, teacher = make(2, 3, 4)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    want = soft_cross_entropy(student[mask], teacher[mask], reduction=reduction)
    dirty = torch.where(mask.unsqueeze(-1), student, float("nan")).requires_grad_()
    theirs = torch.where(mask.unsqueeze(-1), teacher, float("inf"))
    got = soft_cross_entropy(dirty, theirs, 1.0, mask, reduction=reduction)
    torch.testing.assert_close(got[mask] if reduction == "none" else got, want)
    got.sum().backward()
    assert dirty.grad[~mask].eq(0).all() and dirty.grad[mask].ne(0).all()
    assert soft_cross_entropy(student, teacher, 1.0, torch.zeros(2, 3).bool()) == 0
    by_length = soft_cross_entropy(student, teacher, lengths=[3, 1])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert by_length == soft_cross_entropy(student, teacher, 1.0, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(dtype):
    student, teacher = make(6, 5, dtype=dtype)
    got = soft_cross_entropy(student.requires_grad_(), teacher)
    exact = soft_cross_entropy(student.detach().double(), teacher.double())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)
    got.backward()
    assert student.grad.dtype == dtype
    assert vector_cosine(student.detach(), teacher).dtype == torch.float32


def test_large_logits_stay_finite():
    student, teacher = (300 * x for x in make(6, 5, dtype=torch.float32))
    exact = soft_cross_entropy(student.double(), teacher.double())
    torch.testing.assert_close(soft_cross_entropy(student, teacher).double(), exact)


def test_torch_compile_takes_it_whole():
    student, teacher = make(2, 3, 4, dtype=torch.float32)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    compiled = torch.compile(soft_cross_entropy, fullgraph=True, backend="aot_eager")
    want = soft_cross_entropy(student, teacher, 2.0, mask)
    torch.testing.assert_close(compiled(student, teacher, 2.0, mask), want)


def test_vector_cosine():
    x = torch.randn(5, 8)
    torch.testing.assert_close(vector_cosine(3 * x, x), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(vector_cosine(-x.half(), x.half()), torch.tensor(2.0))
    one, two = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    torch.testing.assert_close(vector_cosine(one, two), torch.tensor(0.5))


def test_gradcheck_of_vector_cosine():
    student, teacher = make(3, 4)
    check = torch.autograd.gradcheck
    assert check(lambda x: vector_cosine(x, teacher), [student.requires_grad_()])


X = torch.ones(2, 4)


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (soft_cross_entropy, {"temperature": 0.0}, "temperature 0.0"),
        (soft_cross_entropy, {"temperature": float("nan")}, "temperature nan"),
        (soft_cross_entropy, {"reduction": "batchmean"}, "mean, sum, none"),
        (soft_cross_entropy, {"mask": torch.ones(2)}, "added to scores"),
        (soft_cross_entropy, {"mask": torch.ones(3).bool()}, r"expected \[2\]"),
        (soft_cross_entropy, {"lengths": [1, 2]}, r"\[batch, length\]"),
        (soft_cross_entropy, {"teacher_logits": torch.ones(2, 5)}, "of one shape"),
        (soft_cross_entropy, {"teacher_logits": X.clone().requires_grad_()}, "a gradient"),
        (soft_cross_entropy, {"teacher_logits": X.to("meta")}, "on meta"),
        (vector_cosine, {"teacher": torch.ones(2, 5)}, "project the student"),
        (vector_cosine, {"teacher": X.clone().requires_grad_()}, "a gradient"),
        (vector_cosine, {"teacher": X.to("meta")}, "on meta"),
    ],
)
def test_bad_input_is_named(function, arguments, message):
    suffix = "" if function is vector_cosine else "_logits"
    names = ("student" + suffix, "teacher" + suffix)
    with pytest.raises(UserError, match=message):
        function(**(dict.fromkeys(names, X) | arguments))
