"""attention on Hopper: few rows by split_sm90.py, a prompt's by prompt_sm90.py."""

from functools import partial

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.attention import cuda as every_gpu
from schedules.attention import prompt_sm90, prompt_tile_cuda, split_sm90
from schedules.attention.softmax_cuda import KEYS
from schedules.intrin import cuda
from schedules.targets import GpuTarget

MOST_ROWS = 16


def launch_few(
    num_heads: int, num_kv_heads: int, head_dim: int, kv_bits: int, rows, *tensors
) -> None:
    """Split over a cluster where the cache is packed and its rows are whole words."""
    heads = num_heads, num_kv_heads, head_dim, kv_bits
    form = split_sm90.Form(*heads)
    if not form.is_possible:
        every_gpu.launch_few(*heads, rows, *tensors)
        return
    with T.If(rows <= MOST_ROWS):
        with T.Then(), cuda.some_rows(rows):
            qkv, _, *others = tensors  # it reads the codes as words alone
            split_sm90.launch(form, rows, qkv, *others)
        with T.Else():
            every_gpu.launch_few(*heads, rows, *tensors)


def levels(num_heads: int, num_kv_heads: int, head_dim: int, kv_bits: int) -> dict[str, int]:
    """What a prompt takes beside the step's tensors: `bytes` for every `positions` of a slot."""
    form = prompt_tile_cuda.Form(num_heads, num_kv_heads, head_dim, kv_bits)
    size = num_kv_heads * form.block_bytes if form.is_possible else 0
    return {"positions": KEYS, "bytes": size}


def kernel(
    num_heads: int, num_kv_heads: int, head_dim: int, kv_bits: int, target: GpuTarget
) -> PrimFunc:
    heads = num_heads, num_kv_heads, head_dim, kv_bits
    launch_many = partial(prompt_sm90.launch, target.step_rows)
    return every_gpu.kernel(*heads, target, launch_few, launch_many)
