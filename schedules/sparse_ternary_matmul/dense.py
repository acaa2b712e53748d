"""sparse_ternary_matmul by a kernel of ternary_matmul: every column, whatever the list says.

q is zero off the list, so that the sums are the same. Weights have 1.67 bits and no list is waited
for. On AMX, where half of the columns are active (o_proj behind its TopK), prompts take 0.66 to
0.87 of the walk's time, a token 0.82 to 1.04; at 84 % zeros a token takes 2.2 to 2.8 times
(docs/log.md).
"""

from tvm import tirx
from tvm.tirx import PrimFunc

ACT_BITS = 8


def with_lists(func: PrimFunc) -> PrimFunc:
    """A kernel (q, scale, w, w_scale, residual, out) with index and count, unread, behind scale."""
    q, scale, *others = func.params
    rows, k = q.shape
    index = tirx.decl_buffer((rows, k), "int32", "index")
    count = tirx.decl_buffer((rows,), "int32", "count")
    return PrimFunc([q, scale, index, count, *others], func.body, func.ret_type, func.attrs)
