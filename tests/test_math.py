"""csrc's vector functions against double precision, in ulp, on every instruction set."""

import numpy as np
import pytest
import torch  # noqa: F401  before _C

C = pytest.importorskip("fastffn._C", reason="csrc is not built")
special = pytest.importorskip("scipy.special", reason="the exact erf is scipy's")

EXACT = {
    "exp": np.exp,
    "expm1": np.expm1,
    "tanh": np.tanh,
    "erf": special.erf,
    "sigmoid": special.expit,
}
# Where the result is a normal number: exp and sigmoid flush what is below 2^-125.
RANGE = {"exp": (-86.5, 88.7), "expm1": (-86.5, 88.7), "sigmoid": (-86.5, 104.0)}


@pytest.fixture(params=C.available_isas())
def isa(request):
    before = C.isa()
    C.select_isa(request.param)
    yield request.param
    C.select_isa(before)


def apply(name, x):
    out = np.full_like(x, np.nan)
    C.function(name, x.ctypes.data, out.ctypes.data, x.size)
    return out


@pytest.mark.parametrize("name", EXACT)
def test_within_4_ulp(name, isa):
    low, high = RANGE.get(name, (-104.0, 104.0))
    generator = np.random.default_rng(0)
    tiny = np.ldexp(generator.uniform(0.5, 1, 200_000), generator.integers(-126, 3, 200_000))
    x = np.concatenate(
        [np.linspace(low, high, 1_000_003), tiny, -tiny, np.linspace(-1.1, 1.1, 99_999)]
    )
    x = x[(x >= low) & (x <= high)].astype(np.float32)
    exact = EXACT[name](x.astype(np.float64))
    error = np.abs(apply(name, x) - exact) / np.spacing(np.abs(exact).astype(np.float32))
    assert error.max() <= 4, f"{error.max():.2f} ulp at {x[error.argmax()]!r}"


def test_limits(isa):
    inf, nan = np.inf, np.nan
    x = np.array([-inf, -200, 0, 200, inf, nan], dtype=np.float32)
    expected = {
        "exp": [0, 0, 1, inf, inf, nan],
        "expm1": [-1, -1, 0, inf, inf, nan],
        "tanh": [-1, -1, 0, 1, 1, nan],
        "erf": [-1, -1, 0, 1, 1, nan],
        "sigmoid": [0, 0, 0.5, 1, 1, nan],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(apply(name, x), np.array(values, dtype=np.float32), name)


def test_unknown_function_is_refused():
    with pytest.raises(ValueError, match="cosh"):
        C.function("cosh", 0, 0, 0)
