"""Devices: which GPU runs a library, and refusals that tell what was needed and what was found."""

from dataclasses import dataclass

import numpy as np
import pytest

from runtime import ArtifactError, RuntimeRefusal, tvm_runtime
from runtime.device import Cpu, Cuda, runs_on
from schedules.targets import compute_capability

GIB = 2**30


@dataclass
class FakeGpu:
    """runtime/tvm_runtime.py's Gpu without a driver, its tensors numpy's."""

    exists: bool
    compute_version: str
    available_memory: int
    device: str = "cuda:0"
    waits: int = 0

    def tensor(self, array):
        return array.copy()

    def write(self, tensor, array):
        tensor[...] = array

    def read(self, tensor):
        return tensor.copy()

    def page_locked(self, count):
        array = np.zeros(count, np.int64)
        return array, array

    def wait(self):
        """All that is launched has ended."""
        self.waits += 1


@pytest.fixture
def fake_gpu(monkeypatch):
    """fake_gpu(...) makes the first GPU one with these facts, and returns it."""

    def install(exists=True, compute_version="9.0", free=80 * GIB):
        gpu = FakeGpu(exists, compute_version, free)
        monkeypatch.setattr(tvm_runtime, "load_cuda", lambda: gpu)
        return gpu

    return install


@pytest.mark.parametrize(
    "arch, capability, has_ptx, expected",
    [
        ("sm_90a", "9.0", False, True),
        ("sm_90a", "10.0", True, False),
        ("sm_80", "8.6", False, True),
        ("sm_86", "8.0", False, False),
        ("sm_80", "9.0", False, False),
        ("sm_80", "9.0", True, True),
        ("sm_100", "10.0", False, True),
        ("sm_100", "9.0", True, False),
    ],
)
def test_runs_on(arch, capability, has_ptx, expected):
    assert runs_on(arch, capability, has_ptx) == expected


@pytest.mark.skipif(compute_capability() is not None, reason="this host has a GPU")
def test_no_driver():
    with pytest.raises(ArtifactError, match=r"cannot load libtvm_runtime_cuda\.so: .*--target nat"):
        Cuda(["sm_90a"])


def test_no_gpu(fake_gpu):
    fake_gpu(exists=False)
    with pytest.raises(ArtifactError, match=r"found no GPU or no driver .*--target native"):
        Cuda(["sm_90a"])


def test_gpu_of_another_arch(fake_gpu):
    fake_gpu(compute_version="8.0")
    with pytest.raises(ArtifactError, match=r"built for sm_86, sm_90a; .*capability 8\.0"):
        Cuda(["sm_86", "sm_90a"])


def test_too_little_memory_is_told_by_part(fake_gpu):
    fake_gpu(free=GIB)
    gpu = Cuda(["sm_90a"])
    gpu.require({"weights": GIB // 2, "KV cache": GIB // 4})
    with pytest.raises(
        RuntimeRefusal,
        match=r"1\.61 GB needed \(weights 1\.07 GB, KV cache 537 MB\), 1\.07 GB free",
    ):
        gpu.require({"weights": GIB, "KV cache": GIB // 2})


def test_memory_that_is_gone_when_it_is_asked_for(fake_gpu, monkeypatch):
    """Another process took it after it was weighed."""
    found = fake_gpu(free=GIB)
    gpu = Cuda(["sm_90a"])
    gpu.require({"weights": GIB // 2})

    def full(array):
        raise RuntimeError("InternalError: CUDA: out of memory")

    gpu.place([np.zeros(1000)])
    monkeypatch.setattr(found, "tensor", full)
    with pytest.raises(
        RuntimeRefusal,
        match=r"GPU memory: 537 MB needed \(weights 537 MB\), 1\.07 GB free beside 8 kB of them",
    ):
        gpu.place([np.zeros(1)])


@pytest.mark.parametrize(
    "reason, refusal",
    [
        ("CUDA: out of memory", "GPU memory: 0 B needed"),
        ("cuLaunchKernel: CUDA_ERROR_OUT_OF_MEMORY", "GPU memory: 0 B needed"),
        ("operation not permitted when stream is capturing", "decode: the step cannot be captured"),
        ("CUDAError: failed with error: CUDA_ERROR_ILLEGAL_ADDRESS", "device: a step did not end"),
        ("expects 3 arguments", None),
        ("expects a tensor of cuda:0, got cpu:0", None),
    ],
)
def test_what_a_step_met(fake_gpu, reason, refusal):
    fake_gpu()
    found = Cuda(["sm_90a"]).why(reason)
    assert found is None if refusal is None else found and found.startswith(refusal)


def test_inputs_keep_their_tensors(fake_gpu):
    """A captured graph reads the addresses of its first call."""
    fake_gpu()
    gpu = Cuda(["sm_90a"])
    first = gpu.inputs("decode", [np.array([1, 2]), np.array([0, 1])])
    again = gpu.inputs("decode", [np.array([3, 4]), np.array([5, 6])])
    assert [a is b for a, b in zip(first, again, strict=True)] == [True, True]
    assert [tensor.tolist() for tensor in again] == [[3, 4], [5, 6]]
    assert gpu.inputs("decode", [np.array([1]), np.array([1])])[0] is not first[0]
    assert gpu.inputs("prefill", [np.array([1, 2]), np.array([0, 1])])[0] is not first[0]


def test_inputs_of_prompts_do_not_pile_up(fake_gpu):
    """Nothing knows their addresses: a length that comes back gets new ones."""
    fake_gpu()
    gpu = Cuda(["sm_90a"])
    one = gpu.inputs("prefill", [np.array([1])])[0]
    assert gpu.inputs("prefill", [np.array([2])])[0] is one and one.tolist() == [2]
    gpu.inputs("prefill", [np.array([1, 2])])
    assert gpu.inputs("prefill", [np.array([3])])[0] is not one


def test_a_mailbox_keeps_its_tensors(fake_gpu):
    """What is asked lies in the request; top_k is of 32 bits to the kernel."""
    gpu = fake_gpu()
    mailbox = Cuda(["sm_90a"]).mailbox()
    request, reply = mailbox.tensors
    mailbox.ask((7, 2, 30), 0.5, 2**40, 0.25, 0.125)
    assert request[[0, 1, 2, 4]].tolist() == [7, 2, 30, 2**31 - 1]
    assert request.view(np.float64)[[3, 5, 6]].tolist() == [0.5, 0.25, 0.125]
    reply[0] = 42
    assert mailbox.wait() == 42 and gpu.waits == 1
    for _ in range(2):  # the first one's wait was interrupted: its step may still read
        mailbox.ask((1, 0, 0), 0.5, 1, 1.0, 0.5)
    assert gpu.waits == 2
    assert mailbox.tensors[0] is request and mailbox.tensors[1] is reply


def test_no_page_for_a_mailbox(fake_gpu, monkeypatch):
    fake_gpu()
    gpu = Cuda(["sm_90a"])

    def refuse(*_):
        raise RuntimeError("CUDAError: cuMemAllocHost failed")

    monkeypatch.setattr(FakeGpu, "page_locked", refuse)
    with pytest.raises(RuntimeRefusal, match=r"cuMemAllocHost failed; possible: to end what else"):
        gpu.mailbox()


def test_a_driver_without_memory_of_its_own(fake_gpu, monkeypatch):
    """The first question to a full GPU fails."""
    fake_gpu()
    gpu = Cuda(["sm_90a"])

    def full(_):
        raise RuntimeError("CUDAError: cuInit failed with error: CUDA_ERROR_OUT_OF_MEMORY")

    monkeypatch.setattr(FakeGpu, "available_memory", property(full), raising=False)
    with pytest.raises(RuntimeRefusal, match=r"GPU memory: 1\.07 GB needed .* 0 B free; possible"):
        gpu.require({"weights": GIB})


def test_cpu_refuses_more_than_the_system_maps():
    with pytest.raises(RuntimeRefusal, match="possible: fewer slots"):
        Cpu().zeros([(np.dtype(np.uint8), (1 << 60,))])
