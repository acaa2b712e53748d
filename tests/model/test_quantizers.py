"""The quantizers: the paper's equations, their ranges and errors, and the bugs others have had."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from model import quantizers
from model.quantizers import (
    EPSILON,
    fp4_e2m1,
    int4_absmean,
    int8_absmax,
    kv_absmax,
    ternary_absmean,
    topk_int8,
    topk_mask,
)

FP4_CODES = [0, 1, 2, 3, 4, 6, 8, 12]  # twice the E2M1 grid
ROW_QUANTIZERS = {
    "int4": int4_absmean,
    "int8": int8_absmax,
    "fp4": fp4_e2m1,
    "topk": lambda x, check=True: topk_int8(x, max(1, x.shape[-1] // 2), check),
    "kv4": lambda x, check=True: kv_absmax(x, 4, check),
    "kv3": lambda x, check=True: kv_absmax(x, 3, check),
}
OFFSET = {"kv4": 7, "kv3": 3}
ALL = {**ROW_QUANTIZERS, "ternary": ternary_absmean}
EXAMPLES = settings(max_examples=20, deadline=None)  # the machine may be busy
each_row_quantizer = pytest.mark.parametrize("name", ROW_QUANTIZERS)

# Magnitudes that neither meet EPSILON nor leave fp16, whatever power of two below scales them.
ROWS = st_numpy.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 40)),
    elements=st.floats(-64, 64, width=32).map(lambda v: v if abs(v) >= 2**-6 else 0.0),
)


def codes_of(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed codes as float32, and scales."""
    codes, scale = ROW_QUANTIZERS[name](x)
    return codes.float() - OFFSET.get(name, 0), scale


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@each_row_quantizer
@EXAMPLES
@given(ROWS)
def test_codes_are_in_range(name, rows):
    codes, scale = ROW_QUANTIZERS[name](torch.from_numpy(rows))
    low, high = {
        "int4": (-8, 7), "int8": (-127, 127), "topk": (-127, 127), "fp4": (-12, 12),
        "kv4": (0, 14), "kv3": (0, 6),
    }[name]  # fmt: skip
    assert codes.dtype == (torch.uint8 if name.startswith("kv") else torch.int8)
    assert low <= int(codes.min()) and int(codes.max()) <= high
    assert scale.shape == (*rows.shape[:-1], 1) and scale.dtype == torch.float32
    assert torch.isfinite(scale).all() and (scale > 0).all()
    if name == "fp4":
        assert set(codes.abs().flatten().tolist()) <= set(FP4_CODES)


def test_the_ends_of_each_range_are_used():
    x = gaussian(1, 4096)
    assert set(int4_absmean(x)[0].unique().tolist()) == set(range(-8, 8))
    assert int8_absmax(x)[0].abs().max() == 127
    assert set(fp4_e2m1(x)[0].unique().tolist()) == {s * c for c in FP4_CODES for s in (-1, 1)}
    # One extreme of the two: the other side's largest value need not reach it.
    for bits in (4, 3):
        top = 2 * quantizers.kv_qmax(bits)
        codes = kv_absmax(torch.tensor([[-1.0, 0.0, 1.0]]), bits)[0]
        assert codes.tolist() == [[0, top // 2, top]]
    assert set(ternary_absmean(x)[0].unique().tolist()) == {-1, 0, 1}


@each_row_quantizer
@EXAMPLES
@given(ROWS)
def test_the_round_trip_is_off_by_half_a_step_at_most(name, rows):
    """Half the gap between neighbours; more only for what lies beyond the last code, which is
    what clipping costs, and for what TopK drops."""
    x = torch.from_numpy(rows)
    codes, scale = codes_of(name, x)
    error = (x - codes * scale).abs()
    y = (x / scale).abs()
    gap = torch.ones_like(y)
    beyond = torch.zeros_like(y)
    if name == "fp4":
        gap = 1.0 + (y > 4).float() + 2.0 * (y > 8).float()
    if name == "int4":
        beyond = torch.where(x > 0, y - 7, y - 8).clamp(min=0)
    if name.startswith("kv"):  # the fp16 scale may be 2^-11 smaller than asked
        beyond = torch.full_like(y, quantizers.kv_qmax(int(name[2])) * 2.0**-11)
    bound = (gap / 2 + beyond) * scale * (1 + 1e-5)
    if name == "topk":
        kept = topk_mask(x, max(1, x.shape[-1] // 2))
        assert (codes[~kept] == 0).all()
        error, bound = error[kept], bound[kept]
    assert (error <= bound).all()


@each_row_quantizer
@EXAMPLES
@given(ROWS, st.integers(-5, 5))
def test_a_power_of_two_changes_the_scale_alone(name, rows, exponent):
    x = torch.from_numpy(rows)
    x[:, 0] = 1.0  # a row of zeros has the scale of EPSILON, which does not follow
    codes, scale = codes_of(name, x)
    scaled_codes, scaled_scale = codes_of(name, x * 2.0**exponent)
    assert torch.equal(codes, scaled_codes)
    assert torch.equal(scale * 2.0**exponent, scaled_scale)


@each_row_quantizer
@EXAMPLES
@given(ROWS)
def test_zeros_and_signs_are_kept(name, rows):
    x = torch.from_numpy(rows)
    codes, _ = codes_of(name, x)
    assert (codes[x == 0] == 0).all()
    assert (codes * x >= 0).all()


@each_row_quantizer
@EXAMPLES
@given(ROWS)
def test_no_row_sees_another(name, rows):
    """TopK, the mean or the maximum over a batch of tokens would not be causal."""
    x = torch.from_numpy(rows)
    codes, scale = codes_of(name, x)
    for i in range(len(x)):
        alone = codes_of(name, x[i])
        assert torch.equal(alone[0], codes[i]) and torch.equal(alone[1], scale[i])


def test_a_gaussian_has_the_papers_share_of_zeros():
    """11.99 % under INT4 absmean (the paper's tables: 12.0 to 12.1).

    The half step is t = sqrt(2/pi) / (2 sqrt7) standard deviations. Of n samples the share of zeros
    has the deviation sqrt(p(1-p)/n); beta's own error, 0.756/sqrt(n) relative, moves t, and with it
    the share by 2 phi(t) t times as much. Five times the sum is allowed.
    """
    n = 1_000_000
    t = math.sqrt(2 / math.pi) / (2 * math.sqrt(7))
    p = math.erf(t / math.sqrt(2))
    assert p == pytest.approx(0.1199, abs=5e-5)
    density = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    deviation = (math.sqrt(p * (1 - p)) + 2 * density * t * 0.756) / math.sqrt(n)
    codes, scale = int4_absmean(gaussian(1, n))
    assert float((codes == 0).float().mean()) == pytest.approx(p, abs=5 * deviation)
    assert scale.item() == pytest.approx(0.3016, rel=5 * 0.756 / math.sqrt(n) + 2e-4)


def test_int4_gives_back_the_size_of_its_input():
    """Dequantised by beta instead of beta/sqrt7, the slope would be 2.6; by absmax far less
    energy would be left, as most codes would be 0."""
    x = gaussian(16, 4096)
    codes, scale = codes_of("int4", x)
    slope = (x * codes * scale).sum() / x.square().sum()
    assert slope.item() == pytest.approx(1.0, abs=0.03)


def test_int4_is_the_documented_order_of_float32_operations():
    """docs/architecture.md, "Float orders", written out in numpy."""
    x = gaussian(64, 512, seed=1).numpy() * np.float32(3.7)
    beta = (np.abs(x).astype(np.float64).sum(-1, keepdims=True) / 512).astype(np.float32)
    sqrt7 = np.float32(np.sqrt(7.0))
    codes = np.clip(np.rint(x * (sqrt7 / beta)), -8, 7)
    found, scale = int4_absmean(torch.from_numpy(x))
    assert np.array_equal(found.numpy(), codes) and np.array_equal(scale.numpy(), beta / sqrt7)


def test_int8_and_kv_are_the_documented_order_of_float32_operations():
    x = gaussian(64, 512, seed=2).numpy() * np.float32(0.013)
    gamma = np.abs(x).max(-1, keepdims=True)
    codes = np.clip(np.rint(x * (np.float32(127) / gamma)), -128, 127)
    found, scale = int8_absmax(torch.from_numpy(x))
    assert np.array_equal(found.numpy(), codes)
    assert np.array_equal(scale.numpy(), gamma / np.float32(127))
    for bits, qmax in ((4, 7), (3, 3)):
        step = (gamma / np.float32(qmax)).astype(np.float16).astype(np.float32)
        found, scale = kv_absmax(torch.from_numpy(x), bits)
        expected = np.clip(np.rint(x / step), -qmax, qmax) + qmax
        assert np.array_equal(scale.numpy(), step) and np.array_equal(found.numpy(), expected)


def test_rounding_is_half_to_even():
    # absmax 127 makes the scale 1, so x is in units of the step.
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert int8_absmax(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]
    assert kv_absmax(torch.tensor([[7.0, 0.5, 1.5, 2.5, -2.5]]), 4)[0].tolist() == [
        [14, 7, 9, 9, 5]
    ]


def nearest_fp4(y: float) -> int:
    """Brute force over the 8 magnitudes; index & 1 is E2M1's mantissa bit, which breaks ties."""
    order = sorted(range(8), key=lambda i: (abs(abs(y) - FP4_CODES[i]), i & 1))
    return FP4_CODES[order[0]] * (1 if y >= 0 else -1)


def test_fp4_takes_the_nearest_of_its_grid_and_the_even_one_at_ties():
    middles = [(a + b) / 2 for a, b in itertools.pairwise(FP4_CODES)]
    near = [np.nextafter(np.float32(m), np.float32(d)) for m in middles for d in (0, 99)]
    y = np.array([*FP4_CODES, *middles, *near, *np.linspace(0, 12, 2401)], dtype=np.float32)
    y = np.concatenate([[12.0], y, -y]).astype(np.float32)  # absmax 12 makes the scale 1
    codes, scale = fp4_e2m1(torch.from_numpy(y)[None])
    assert scale.item() == 1.0
    assert codes[0].tolist() == [nearest_fp4(float(v)) for v in y]


@EXAMPLES
@given(ROWS)
def test_fp4_is_the_nearest_code_at_any_scale(rows):
    codes, scale = codes_of("fp4", torch.from_numpy(rows))
    y = torch.from_numpy(rows) / scale
    distance = (y[..., None].abs() - torch.tensor(FP4_CODES)).abs()
    assert torch.equal((y.abs() - codes.abs()).abs(), distance.amin(-1))


def test_int4_is_the_absmean_not_the_absmax():
    """One outlier among ones: the mean gives codes of 2 and clips it, the maximum would give 0."""
    x = torch.ones(1, 64)
    x[0, 0] = 36.0
    codes, _ = int4_absmean(x)  # beta = 99 / 64, so the step is 0.585
    assert codes[0, :3].tolist() == [7, 2, 2]


def test_int8_scale_is_of_the_whole_row_also_under_topk():
    x = gaussian(8, 64)
    assert torch.equal(topk_int8(x, 5)[1], int8_absmax(x)[1])
    codes, full = topk_int8(x, 5)[0], int8_absmax(x)[0]
    mask = topk_mask(x, 5)
    assert torch.equal(codes, full * mask) and ((codes != 0).sum(-1) == 5).all()


@each_row_quantizer
def test_a_row_of_zeros_gives_zeros(name):
    codes, scale = codes_of(name, torch.zeros(3, 8))
    assert not codes.any()
    steps = {"int4": math.sqrt(7), "int8": 127, "topk": 127, "fp4": 12}
    smallest = EPSILON / steps[name] if name in steps else 2.0**-14
    assert scale.flatten().tolist() == pytest.approx([smallest] * 3, rel=1e-6)


@each_row_quantizer
@pytest.mark.parametrize("size", [1e-38, 1e-6, 1e30, 3.4e38])
def test_rows_of_any_size_give_finite_scales(name, size):
    codes, scale = codes_of(name, gaussian(4, 32).clamp(-1, 1) * size)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    if name.startswith("kv") and size > 1e29:  # beyond fp16: saturated, not wrapped
        assert (scale == 65504).all()
        assert (codes.abs() == quantizers.kv_qmax(int(name[2]))).all()
    elif size > 1:
        assert codes.any(dim=-1).all()


def test_all_zero_weights_are_all_zero_codes():
    codes, scale = ternary_absmean(torch.zeros(4, 4))
    assert not codes.any() and scale.item() == pytest.approx(EPSILON)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_in_one_line(name, bad):
    x = torch.ones(2, 8)
    x[1, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity") as error:
        ALL[name](x)
    assert "\n" not in str(error.value)
    ALL[name](x, check=False)


def test_kv_scales_are_fp16_and_a_cache_has_3_or_4_bits():
    x = gaussian(512, 64) * torch.logspace(-6, 4, 512)[:, None]
    for bits in (3, 4):
        scale = kv_absmax(x, bits)[1]
        assert torch.equal(scale, scale.half().float()) and scale.min() == 2.0**-14
    with pytest.raises(ValueError, match=r"no 5-bit KV cache; has \[3, 4\]"):
        kv_absmax(x, 5)


def test_ternary_scale_is_the_mean_of_the_whole_tensor():
    w = gaussian(48, 32) * torch.linspace(0.1, 3.0, 48)[:, None]
    codes, scale = ternary_absmean(w)
    assert scale.shape == () and scale.item() == pytest.approx(w.abs().mean().item(), rel=1e-6)
    assert torch.equal(codes, (w.abs() > scale / 2) * w.sign().to(torch.int8))


FAKES = {
    "int4": (quantizers.fake_int4, int4_absmean),
    "int8": (quantizers.fake_int8, int8_absmax),
    "fp4": (quantizers.fake_fp4, fp4_e2m1),
    "topk": (lambda x: quantizers.fake_topk_int8(x, 24), lambda x: topk_int8(x, 24)),
    "ternary": (quantizers.fake_ternary, ternary_absmean),
    "kv4": (lambda x: quantizers.fake_kv(x, 7), lambda x: codes_of("kv4", x)),
    "kv3": (lambda x: quantizers.fake_kv(x, 3), lambda x: codes_of("kv3", x)),
}


@pytest.mark.parametrize("name", FAKES)
def test_training_sees_the_same_codes_and_the_gradient_of_the_identity(name):
    """x + (q s - x) in float32 rounds at the size of x: 2^-22 of it is two roundings. The mean of
    fake_int4 and fake_ternary is float32, a step away at the most."""
    fake, exact = FAKES[name]
    x = gaussian(32, 64, seed=3).requires_grad_()
    y = fake(x)
    codes, scale = exact(x.detach())
    assert torch.allclose(
        y, codes * scale, rtol=2e-7 * 4, atol=float(x.detach().abs().max()) * 2.0**-22
    )
    weight = gaussian(32, 64, seed=4)
    (y * weight).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weight)


def test_fake_kv_mixes_bit_widths():
    x = gaussian(3, 16)
    mixed = quantizers.fake_kv(x, torch.tensor([[7.0], [3.0], [3.0]]))
    assert torch.equal(mixed[0], quantizers.fake_kv(x[:1], 7)[0])
    assert torch.equal(mixed[1:], quantizers.fake_kv(x[1:], 3))


@EXAMPLES
@given(st.sampled_from([torch.bfloat16, torch.float16]), st.integers(0, 99))
def test_16_bit_inputs_are_quantised_as_float32(dtype, seed):
    x = gaussian(2, 32, seed=seed).to(dtype)
    for name in ROW_QUANTIZERS:
        ours, theirs = codes_of(name, x), codes_of(name, x.float())
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
