"""Round a block of columns by GPTQ in one kernel, written in Triton (https://triton-lang.org), on a CUDA GPU.

The columns of a block depend on each other, but the outputs, the N rows of the weight, do not: each program takes ROWS
of them through all columns. In torch the same is a thousand kernels, one after the other.

Triton comes with torch's builds for CUDA on Linux. Importing this module imports it.
"""

# no `from __future__ import annotations`: Triton reads those of the kernel

import torch
import triton
import triton.language as tl

ROWS = 16  # outputs of a program; with WARPS the fastest of those tried on an H200
WARPS = 1
HALF = {"FP8_DYNAMIC": 0.0, "W4A16": 8.0, "W8A8": 128.0, "W8A16": 128.0}  # of an integer grid's values; 0: float8
INTEGERS = 12582912.0  # 1.5 · 2²³: a float32 that is added to it and taken off again is rounded, half to even


def block(
    columns: torch.Tensor, scales: torch.Tensor, inner: torch.Tensor, scheme: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values and the errors [B, N] of B columns, as `gptq` defines them.

    Args:
        columns: What is left of the columns, float32 [B, N]; B is a power of two.
        scales: Their scales, float32 [B, N].
        inner: Their part of the factor, float32 [B, B].
        scheme: The scheme, which sets the grid.
    """
    count, outputs = columns.shape
    values, errors = torch.empty_like(columns), torch.empty_like(columns)
    given = (columns.contiguous(), scales.contiguous(), inner.contiguous(), values, errors, outputs)
    _round[(triton.cdiv(outputs, ROWS),)](*given, HALF[scheme], INTEGERS, count, ROWS, num_warps=WARPS)
    return values, errors


@triton.jit  # type: ignore[untyped-decorator]
def _round(  # type: ignore[no-untyped-def]  # Triton compiles this, and knows no names but its own
    columns,
    scales,
    inner,
    values,
    errors,
    outputs,
    half: tl.constexpr,
    integers: tl.constexpr,
    count: tl.constexpr,
    width: tl.constexpr,
):
    each = tl.arange(0, count)
    rows = tl.program_id(0) * width + tl.arange(0, width)
    there = rows < outputs
    left = tl.load(columns + each[:, None] * outputs + rows[None, :], mask=there[None, :], other=0.0)
    for column in range(count):
        at = column * outputs + rows
        own = tl.sum(tl.where(each[:, None] == column, left, 0.0), axis=0)
        scale = tl.load(scales + at, mask=there, other=1.0)
        value = tl.div_rn(own, scale)
        if half == 0.0:  # float8_e4m3fn: three bits after the leading one, and no step below 2⁻⁹
            value = tl.minimum(tl.maximum(value, -448.0), 448.0)
            exponent = (tl.abs(value).to(tl.int32, bitcast=True) >> 23) - 127
            step = ((tl.maximum(exponent, -6) + 124) << 23).to(tl.float32, bitcast=True)
            value = (value + integers * step) - integers * step
        else:
            value = (tl.minimum(tl.maximum(value, -half), half - 1.0) + integers) - integers
        error = tl.div_rn(own - value * scale, tl.load(inner + column * count + column))
        tl.store(values + at, value, mask=there)
        tl.store(errors + at, error, mask=there)
        later = tl.load(inner + column * count + each, mask=each > column, other=0.0)
        left = left - later[:, None] * error[None, :]
