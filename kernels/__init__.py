"""Triton kernels, generated from Programs. Installed as `fastffn.kernels`; importing it is free.

    math     the functions that the formulas of csrc/primitives.def call, for Triton
    codegen  Program -> the text of a Triton function, kept in real files
    segment  one elementwise Program over 2-D operands in one kernel (its text: segment_source)
    linear   matrix products with a Program for epilogue (their text: linear_source), and weight
             gradients (linear_weight)
    residual_norm  program, dropout (philox), residual and LayerNorm (text: residual_norm_source)
    relation  relations between tokens, compared between two models (relation_tokens,
             relation_forward, relation_backward)
    tiles    block sizes and warps by formula

Nothing here asks for a GPU until a kernel is launched. docs/kernels.md says why it is built so.
"""
