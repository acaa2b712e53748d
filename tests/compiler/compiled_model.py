"""A tiny model of a variant, in torch and compiled, side by side on the same weights and caches."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
import tvm

from compiler import pipeline
from compiler.export import export_model
from compiler.kernels import families_of, using
from model import random
from model.checkpoint import IntegerWeights, load_integer_model
from model.config import MODELS, ModelConfig
from model.integer import Decode, IntegerModel, Prefill
from runtime import tvm_runtime
from runtime.device import Device, open_device
from schedules.layouts import LAYOUTS
from schedules.targets import TARGETS

TINY = MODELS["tiny"]
VARIANTS = {
    "a4.8-int4": TINY,
    "a4.8-fp4": TINY.replace(activation_format="fp4", tie_word_embeddings=False, head_bits=4),
    "b1.58": TINY.with_variant("b1.58").replace(head_bits=6),
    "llama": TINY.with_variant("llama"),
}
KV_BITS = (16, 4, 3)


exported = cache(export_model)


@dataclass
class CompiledModel:
    """Functions of the virtual machine, taking and returning numpy arrays."""

    config: ModelConfig
    reference: IntegerModel
    executable: tvm.runtime.Executable
    device: Device
    params: list

    def caches(self, kv_bits: int, slots: int = 3, context: int = 32) -> "Caches":
        return Caches(self, self.reference.empty_caches(kv_bits, slots, context), kv_bits)

    def prefill(self, caches: "Caches", tokens, slots, positions, rows) -> np.ndarray:
        return self._step(caches, "prefill", tokens, slots, positions, rows)

    def decode(self, caches: "Caches", tokens, slots, positions) -> np.ndarray:
        has_one = tvm_runtime.function_or_none(caches.vm, f"decode_one_kv{caches.bits}")
        name = "decode_one" if has_one and len(tokens) == 1 else "decode"
        return self._step(caches, name, tokens, slots, positions)

    def _step(self, caches: "Caches", name: str, *inputs) -> np.ndarray:
        full_name, arguments = f"{name}_kv{caches.bits}", self.arguments(caches, name, *inputs)
        call = full_name, len(inputs[0])
        if call not in caches.captured:
            tvm_runtime.fill_pool(caches.vm, full_name, arguments)
            caches.captured.add(call)
        return self.device.fetch(caches.vm[full_name](*arguments))

    def arguments(self, caches: "Caches", name: str, *inputs) -> list:
        arrays = [np.asarray(a, np.int64) for a in inputs]
        return [*self.device.inputs(name, arrays), caches.compiled, self.params]

    def reference_prefill(self, caches: "Caches", tokens, slots, positions, rows) -> np.ndarray:
        arrays = [torch.tensor(a) for a in (tokens, slots, positions, rows)]
        logits, caches.torch = Prefill(self.reference, caches.bits)(*arrays, caches.torch)
        return logits.numpy()

    def reference_decode(self, caches: "Caches", tokens, slots, positions) -> np.ndarray:
        arrays = [torch.tensor(a) for a in (tokens, slots, positions)]
        logits, caches.torch = Decode(self.reference, caches.bits)(*arrays, caches.torch)
        return logits.numpy()


@dataclass
class Caches:
    """One state of all layers, twice: functional in torch, updated in place when compiled.

    It has a virtual machine of its own: one that captured a step knows the caches' addresses.
    """

    model: CompiledModel
    torch: list[torch.Tensor]
    bits: int
    compiled: list = field(init=False)
    captured: set = field(default_factory=set)  # steps that ran, by name and rows

    def __post_init__(self) -> None:
        self.device = self.model.device
        self.vm = tvm.runtime.vm.VirtualMachine(self.model.executable, self.device.handle)
        self.compiled = self.device.place(aligned(t.numpy()) for t in self.torch)

    def pairs(self):
        """(compiled, torch) arrays of every layer: codes, then scales."""
        return [
            (self.device.fetch(c), t.numpy())
            for c, t in zip(self.compiled, self.torch, strict=True)
        ]


def aligned(array: np.ndarray) -> np.ndarray:
    """A writeable copy on a 64-byte boundary, which a device may share."""
    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def compile_tiny(variant: str, target: str, directory: Path) -> CompiledModel:
    """Random weights of a variant, compiled in memory for a row of TARGETS."""
    config, spec = VARIANTS[variant], TARGETS[target]
    if not families_of("grouped_matmul", spec.families):
        config = config.replace(head_bits=8)
    random.write(config, directory)
    weights = IntegerWeights(directory)
    with using(spec), spec.to_tvm():
        lowered = pipeline.lower(exported(config), KV_BITS)
        executable = pipeline.generate(lowered, spec)
    layouts = lowered.attrs["layouts"]
    params = []
    for name in map(str, lowered.attrs["param_names"]):
        array = weights[name]
        if name in layouts:
            array = LAYOUTS[layouts[name]].pack(array)
        params.append(aligned(array))
    device = open_device(spec.needs())
    reference = load_integer_model(directory)
    return CompiledModel(config, reference, executable, device, device.place(params))
