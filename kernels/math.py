"""The functions that the formulas of the table of primitives call, as Triton functions.

Operands are fp32 or fp64 tensors or constants; bf16 and fp16 are widened by the caller.

fp32 stays on the two fast instructions of the hardware, exp2 and rsqrt: e^x is exp2(x log2(e)), one
multiplication more where `tl.exp` costs four instructions, and 1/x for x >= 1 is rsqrt(x)^2, two
instructions with the error bound (2.6e-7) of the six that `/` costs (2.4e-7). The relative error
of e^x grows with the argument, |x| / 2 ulp; as the formulas use it, it is large only where the
result is negligible beside the other terms. fp64 takes the long way everywhere.

NaN goes in and comes out as in torch (`tl.maximum` by itself drops it). Of libdevice only erf is
used, so that the interpreter runs every line.
"""

import triton
import triton.language as tl


@triton.jit
def where(condition, then, otherwise):
    """`then` where the condition holds, else `otherwise`."""
    return tl.where(condition, then, otherwise)


@triton.jit
def maximum(a, b):
    """The larger operand; NaN if either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exp(x):
    """e^x."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * 1.4426950408889634)


@triton.jit
def reciprocal(x):
    """1 / x for x >= 1, infinity included (smaller x would meet subnormals)."""
    if x.dtype == tl.float64:
        return 1.0 / x
    else:
        root = tl.rsqrt(x)
        return root * root


@triton.jit
def expm1(x):
    """e^x - 1 without cancellation near 0: 3 ulp for x < 1.

    fp32: near 0 a polynomial in x (Chebyshev, degree 7, 1 ulp). fp64: (u - 1) x / log(u) with u =
    e^x, whose rounding errors cancel (Kahan; Higham, Accuracy and Stability of Numerical
    Algorithms, 1.14.1).
    """
    if x.dtype == tl.float64:
        u = tl.exp(x)
        quotient = (u - 1.0) * (x / tl.log(u))
        return tl.where(
            u == 1.0, x, tl.where((u - 1.0 == -1.0) | (u == u * 2.0), u - 1.0, quotient)
        )
    else:
        p = 0.000199448744 * x + 0.0013982186
        p = p * x + 0.00833323613
        p = p * x + 0.0416657912
        p = p * x + 0.166666668
        p = p * x + 0.5
        return tl.where(tl.abs(x) < 0.5, x * x * p + x, tl.exp2(x * 1.4426950408889634) - 1.0)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, 3 ulp.

    1 - 2 e / (1 + e) with e = e^(-2|x|) loses all digits near 0, so there fp32 takes an odd
    polynomial (Chebyshev in x^2, degree 11, 1 ulp), and fp64 -m / (2 + m) with m = expm1(-2|x|).
    """
    magnitude = tl.abs(x)
    if x.dtype == tl.float64:
        m = expm1(-2.0 * magnitude)
        y = -m / (2.0 + m)
        return tl.where(x < 0.0, -y, y)
    else:
        square = x * x
        p = -0.00661022133 * square + 0.0213093842
        p = p * square - 0.0539094278
        p = p * square + 0.133331137
        p = p * square - 0.33333332
        e = tl.exp2(magnitude * -2.8853900817779268)
        y = 1.0 - 2.0 * e * reciprocal(1.0 + e)
        return tl.where(magnitude < 0.55, x * square * p + x, tl.where(x < 0.0, -y, y))


@triton.jit
def erf(x):
    """Error function."""
    return tl.math.erf(x)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), from p = 1 / (1 + e^|x|) as p or 1 - p.

    So the result is rounded once where it is near 1: gradients multiply 1 - sigmoid by up to a
    cube of x, and an error of two units there is a hundred in them. No instruction more than
    with a division.
    """
    e = exp(-tl.abs(x))
    p = e * reciprocal(1.0 + e)
    return tl.where(x > 0.0, 1.0 - p, p)
