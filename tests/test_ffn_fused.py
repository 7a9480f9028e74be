"""The block on the Triton kernels against torch: interpreted here, for real on a GPU."""

import functools

import ffn_checks as checks
import interpreter
import pytest
import torch
from ffn_checks import GENES


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def check(request):
    """Calls a function of `ffn_checks` where its kernels run, with the device first."""
    if request.param == "cuda":
        return lambda function, *args, **kwargs: function("cuda", *args, **kwargs)
    return lambda function, *args, **kwargs: interpreter.call(
        functools.partial(function, "cpu", *args, **kwargs)
    )


@pytest.mark.parametrize("name", GENES)
def test_every_kind_of_gene(check, name):
    check(checks.agrees, GENES[name], torch.float32, dropout=0.25)


@pytest.mark.parametrize("name", ["epilogue", "everything"])
def test_float16(check, name):
    check(checks.agrees, GENES[name], torch.float16)


@pytest.mark.parametrize("name", ["epilogue", "x in the middle", "everything"])
def test_genes_that_share_the_first_product(check, name):
    check(checks.agrees, GENES[name], torch.float32, widths=(7, 24, 13))
