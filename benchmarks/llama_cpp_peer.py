"""The peer of benchmarks/cpu.py: llama-cpp-python, in a process and a Python of its own.

    pip install llama-cpp-python gguf numpy      wherever `--peer-python` points

Speaks benchmarks/worker.py's protocol. Writes GGUF models of any shape with random weights, so that
nothing has to be downloaded: architecture `bitnet`, ternary weights in TQ2_0 or TQ1_0, the
embedding, which is the head too, in Q6_K. Single matmuls go through the ggml libraries inside.
"""

import ctypes
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from worker import refuse, serve  # the same folder, whatever the working directory

try:
    import gguf
    import llama_cpp
    import numpy as np
except Exception as error:  # none, or one whose library cannot be loaded
    refuse(error)

TYPES = {name: gguf.GGMLQuantizationType[name] for name in ("TQ2_0", "TQ1_0")}
CACHES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # ggml's numbers of types
BATCH = 512


def random_blocks(rng, rows: int, columns: int, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Bytes of a quantised (rows, columns) matrix with finite scales."""
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, columns // per_block, block_bytes), dtype=np.uint8)
    if kind == TYPES["TQ2_0"]:  # four codes 0, 1, 2 a byte
        codes = np.arange(81)
        valid = sum((codes // 3**i % 3) << 2 * i for i in range(4)).astype(np.uint8)
        blocks = valid[blocks % 81]
    blocks[..., -2:] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)  # d comes last
    return blocks.reshape(rows, -1)


def write_model(path: str, kind: str, shape: dict) -> dict:
    """A GGUF file of a model's shape (the fields of its config.json)."""
    hidden, glu, heads = (
        shape[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    kv = hidden // heads * shape["num_key_value_heads"]
    rng, ternary = np.random.default_rng(0), TYPES[kind]
    writer = gguf.GGUFWriter(path, "bitnet")
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(glu)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def norm(name: str, size: int) -> None:
        writer.add_tensor(name, np.ones(size, np.float32))

    def matrix(name: str, rows: int, columns: int, type_=ternary) -> None:
        writer.add_tensor(name, random_blocks(rng, rows, columns, type_), raw_dtype=type_)

    matrix("token_embd.weight", shape["vocab_size"], hidden, gguf.GGMLQuantizationType.Q6_K)
    norm("output_norm.weight", hidden)
    for i in range(shape["num_hidden_layers"]):
        layer = f"blk.{i}."
        norm(f"{layer}attn_norm.weight", hidden)
        norm(f"{layer}attn_sub_norm.weight", hidden)
        norm(f"{layer}ffn_norm.weight", hidden)
        norm(f"{layer}ffn_sub_norm.weight", glu)
        matrix(f"{layer}attn_q.weight", hidden, hidden)
        matrix(f"{layer}attn_k.weight", kv, hidden)
        matrix(f"{layer}attn_v.weight", kv, hidden)
        matrix(f"{layer}attn_output.weight", hidden, hidden)
        matrix(f"{layer}ffn_gate.weight", glu, hidden)
        matrix(f"{layer}ffn_up.weight", glu, hidden)
        matrix(f"{layer}ffn_down.weight", hidden, glu)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"bytes": Path(path).stat().st_size}


class Model:
    """A loaded model and what is in its cache."""

    def __init__(self, path: str, context: int, threads: int, cache: str) -> None:
        quiet = llama_cpp.llama_log_callback(lambda *_: None)
        self._quiet = quiet  # kept alive
        llama_cpp.llama_log_set(quiet, None)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not model:
            raise RuntimeError("llama.cpp cannot read this file")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = context
        params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = CACHES[cache]
        self.context = llama_cpp.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no cache of {context} tokens in {cache} for it")
        vocab = llama_cpp.llama_model_get_vocab(model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.rng = np.random.default_rng(0)
        self.filled = 0

    def threads(self, count: int) -> None:
        llama_cpp.llama_set_n_threads(self.context, count, count)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        self.filled = 0

    def append(self, count: int) -> float:
        """Seconds for `count` random tokens more, the logits of the last."""
        ids = self.rng.integers(0, self.vocab_size, count).astype(np.int32)
        tokens = (ctypes.c_int32 * count)(*ids)
        started = time.perf_counter()
        batch = llama_cpp.llama_batch_get_one(tokens, count)
        if status := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode says {status}")
        llama_cpp.llama_synchronize(self.context)
        seconds = time.perf_counter() - started
        self.filled += count
        return seconds


class Ggml:
    """Matmuls of ggml over several copies of the weights in one graph."""

    def __init__(self) -> None:
        folder = Path(llama_cpp.__file__).parent / "lib"
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"))
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        for name in ("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph"):
            getattr(self.base, name).restype = ctypes.c_void_p
        self.base.ggml_get_data.restype = ctypes.c_void_p
        self.cpu.ggml_cpu_init()

    def matmul(self, kind: str, n: int, k: int, m: int, copies: int):
        """run(threads) -> seconds of one of `copies` products of (m, k) and (n, k)."""
        base, type_ = self.base, TYPES[kind]
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
        weight_bytes = n * k // per_block * block_bytes
        result_bytes = 4 * m * (n + 4 * k)

        class InitParams(ctypes.Structure):
            _fields_ = (
                ("mem_size", ctypes.c_size_t),
                ("mem_buffer", ctypes.c_void_p),
                ("no_alloc", ctypes.c_bool),
            )

        room = copies * (weight_bytes + result_bytes + 4096) + (16 << 20)
        base.ggml_init.argtypes = (InitParams,)
        context = ctypes.c_void_p(base.ggml_init(InitParams(room, None, False)))

        def tensor(type_number: int, columns: int, rows: int) -> ctypes.c_void_p:
            sizes = ctypes.c_int64(columns), ctypes.c_int64(rows)
            return ctypes.c_void_p(base.ggml_new_tensor_2d(context, type_number, *sizes))

        def fill(of: ctypes.c_void_p, array: np.ndarray) -> None:
            ctypes.memmove(base.ggml_get_data(of), array.ctypes.data, array.nbytes)

        rng, graph = np.random.default_rng(0), ctypes.c_void_p(base.ggml_new_graph(context))
        x = tensor(int(gguf.GGMLQuantizationType.F32), k, m)
        fill(x, rng.standard_normal((m, k), np.float32))
        packed = random_blocks(rng, n, k, type_)
        for _ in range(copies):
            w = tensor(int(type_), k, n)
            fill(w, packed)
            product = ctypes.c_void_p(base.ggml_mul_mat(context, w, x))
            base.ggml_build_forward_expand(graph, product)

        def run(threads: int) -> float:
            started = time.perf_counter()
            self.cpu.ggml_graph_compute_with_ctx(context, graph, ctypes.c_int(threads))
            return (time.perf_counter() - started) / copies

        run.free = lambda: base.ggml_free(context)
        return run


class Peer:
    """The requests; see benchmarks/worker.py."""

    def __init__(self) -> None:
        self.model: Model | None = None
        self.ggml: Ggml | None = None
        self.run = None

    def hello(self) -> dict:
        return {"version": f"llama-cpp-python {llama_cpp.__version__}"}

    def write_model(self, path: str, kind: str, shape: dict) -> dict:
        return write_model(path, kind, shape)

    def load(self, path: str, context: int, threads: int, cache: str) -> dict:
        self.model = Model(path, context, threads, cache)
        return {}

    def threads(self, count: int) -> dict:
        self.model.threads(count)
        return {}

    def prompt(self, tokens: int) -> dict:
        self.model.clear()
        return {"seconds": self.model.append(tokens)}

    def fill(self, position: int) -> dict:
        """Fill the cache up to a position."""
        while self.model.filled < position:
            self.model.append(min(BATCH, position - self.model.filled))
        return {}

    def decode(self, steps: int) -> dict:
        return {"seconds": sum(self.model.append(1) for _ in range(steps))}

    def clear(self) -> dict:
        self.model.clear()
        return {}

    def prepare(self, kind: str, n: int, k: int, m: int, copies: int) -> dict:
        if self.run:
            self.run.free()
        self.ggml = self.ggml or Ggml()
        self.run = self.ggml.matmul(kind, n, k, m, copies)
        return {}

    def kernel(self, threads: int) -> dict:
        return {"seconds": self.run(threads)}


if __name__ == "__main__":
    serve(Peer())
