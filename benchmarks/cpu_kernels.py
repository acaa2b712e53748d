"""Group `kernels` of benchmarks/cpu.py: one kernel at a time, weights cold for one token."""

from benchmarks import cold
from benchmarks.cpu_bench import DENSE, Bench
from benchmarks.cpu_page import OURS

GEMM_TOKENS = (128, 512)
HEAD_BITS = (8, 6, 4)
ZEROS = (0.3, 0.5, 0.84, 0.92)  # at down_proj: too few, half, the paper's 7B, the shipped model's
LAUNCHES = 2000


def measure_stream(bench: Bench) -> None:
    nbytes = cold.stream_bytes()
    ask = {OURS: {"kind": "stream", "nbytes": nbytes}}
    bench.kernel("streaming read", nbytes / 1e9, "GB", ask)


def measure_ternary(bench: Bench) -> None:
    """Every shape of the model's ternary matmuls beside each peer's format."""
    hidden, glu = bench.shape["hidden_size"], bench.shape["intermediate_size"]
    kv = bench.shape["num_key_value_heads"] * bench.shape["head_dim"]
    peers = {name: {"kind": name} for name in bench.workers if name != OURS}
    for n, k in dict.fromkeys([(hidden, hidden), (kv, hidden), (glu, hidden), (hidden, glu)]):
        for m in (1, *GEMM_TOKENS):
            sizes = {"n": n, "k": k, "m": m, "copies": cold.copies(n * k / 4) if m == 1 else 2}
            for act_bits in (4, 8):
                ask = {OURS: {"kind": "matmul", "act_bits": act_bits}, **peers}
                ask = {name: request | sizes for name, request in ask.items()}
                test = f"{n}x{k}, {m} token{'s' * (m > 1)}, INT{act_bits}"
                bench.kernel(test, 2e-9 * n * k * m, "G op", ask, share=m == 1)


def measure_sparse(bench: Bench) -> None:
    """down_proj by its non-zero columns beside our dense kernel of the same shape."""
    hidden, glu = bench.shape["hidden_size"], bench.shape["intermediate_size"]
    sizes, nbytes = {"n": hidden, "k": glu, "m": 1}, glu * hidden / 4
    for zeros in ZEROS:
        ask = {
            OURS: {
                "kind": "sparse",
                "zeros": zeros,
                "copies": cold.copies(nbytes * (1 - zeros), held=nbytes),
            },
            DENSE: {"kind": "matmul", "act_bits": 8, "copies": cold.copies(nbytes)},
        }
        ask = {name: sizes | request for name, request in ask.items()}
        bench.kernel(f"down_proj, {zeros:.0%} zeros", 1, "us", ask, share=1 - zeros)


def measure_head(bench: Bench) -> None:
    hidden, vocab = bench.shape["hidden_size"], bench.shape["vocab_size"]
    for bits in HEAD_BITS:
        sizes = {"n": vocab, "k": hidden, "m": 1, "copies": cold.copies(vocab * hidden * bits / 8)}
        request = {"kind": "head", "bits": bits, **sizes}
        bench.kernel(f"head, {bits} bits", 1, "us", {OURS: request}, share=1)


def measure_launch(bench: Bench) -> None:
    for ours in (True, False):
        ask = {OURS: {"kind": "launch", "is_launched_by_us": ours, "copies": LAUNCHES}}
        name = "launch" if ours else "launch by TVM's pool"
        bench.kernel(name, 1, "us", ask)


def measure_kernels(bench: Bench) -> None:
    measure_ternary(bench)
    measure_sparse(bench)
    measure_head(bench)
    measure_launch(bench)
