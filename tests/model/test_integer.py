"""The integer forward against the training forward, and against itself in other step sizes.

How near the two can be. The same weights give the same integers: the training forward (fake
quantisation, float32) and the integer forward differ in the order of float32 sums, in float32
against float64 means and angles, so in a few units of 1e-7 before each rounding. Where no code
flips, the hidden states agree to some 1e-6. A code flips when what it rounds stands within that
error of a half: at most |code| x 1e-6 on each side, 1e-5 for INT4 and 1e-4 for INT8 codes, which
for the 17,000 codes of a 24-token sequence is a flip in one sequence of some ten (measured: one of
eight). A flip changes one input of one linear by one step, a few per cent of a hidden state at the
most, and then flips others, at later positions too, but in no other sequence. Hence `agree`: at
least half of eight sequences agree to 1e-4 at every position (five of eight flipped by chance: 1 in
2000 seeds, and the seed is fixed), and none is off by more than FLIP anywhere. A wrong quantizer
moves every sequence by ten per cent and more.
What only the integer forward has is taken out: the head's INT8 input has its own test, and the
attention of the training forward is replaced by the served one (float16 keys and values, or INT8
queries and byte probabilities), written for whole sequences.
"""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    TINY,
    VARIANTS,
    integer_hidden,
    integer_model,
    random_tokens,
    relative_error,
    rows_of,
    training_model,
)
from torch import Tensor

from model import bitnet
from model.config import ModelConfig
from model.integer import Decode, IntegerModel, Prefill
from model.quantizers import fake_int8

SEQUENCES, LENGTH = 8, 24
NO_FLIP = 1e-4
FLIP = 0.1

CASES = {
    **{f"a4.8-{fmt}-kv{bits}": VARIANTS[f"a4.8-{fmt}"].replace(kv_bits=bits)
       for fmt in ("int4", "fp4") for bits in (16, 4, 3)},
    "b1.58": VARIANTS["b1.58"],
    "llama": VARIANTS["llama"],
    "untied": TINY.replace(tie_word_embeddings=False),
    "no-groups": TINY.replace(num_key_value_heads=4),
    "wide-heads": TINY.replace(head_dim=24, topk_fraction=0.3),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def integer(tmp_path):
    """integer(config) -> the integer model of the training model of `config`."""
    return lambda config, seed=0: integer_model(training_model(config, seed), tmp_path)


def served_attention(kv_bits: int):
    """docs/architecture.md's attention for scaled_dot_product_attention, k and v being [B, H, T, D]
    and already levels x scale; up to one block of 64 positions."""

    def attention(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:
        length, group = q.shape[2], q.shape[1] // k.shape[1]
        assert length <= 64
        v_scale = torch.ones(1, 1, 1, dtype=torch.float64)
        if kv_bits == 16:
            k, v = k.half().double(), v.half().double()
        else:
            q = fake_int8(q)
            v_scale = v.double().abs().amax(-1) / bitnet.kv_levels(length, kv_bits, v.device)[:, 0]
            v_scale = v_scale.repeat_interleave(group, 1)[:, :, None, :]
        k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
        scores = q.double() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        hidden = torch.ones(length, length).triu(1).bool()
        e = (scores - scores.masked_fill(hidden, -torch.inf).amax(-1, keepdim=True)).exp()
        e = e.masked_fill(hidden, 0.0)
        if kv_bits == 16:
            return (e @ v / e.sum(-1, keepdim=True)).float()
        w = e * v_scale
        unit = w.amax(-1, keepdim=True) / 255
        return ((w / unit).round() * unit / v_scale @ v / e.sum(-1, keepdim=True)).float()

    return attention


def training_hidden(config: ModelConfig, tokens: Tensor, monkeypatch, attention=None) -> Tensor:
    """The last norm's output in the stage that is served, through the served attention."""
    model = training_model(config)
    with monkeypatch.context() as patch:
        patch.setattr(
            F, "scaled_dot_product_attention", attention or served_attention(config.kv_bits)
        )
        hidden = model.model(tokens, "hybrid" if config.variant == "a4.8" else "a8")
    return model.model.norm(hidden)


def agree(found: Tensor, expected: Tensor) -> bool:
    worst = relative_error(found, expected).amax(dim=1)  # of each sequence
    return bool((worst < NO_FLIP).sum() * 2 >= len(worst) and worst.max() < FLIP)


@pytest.mark.parametrize("name", CASES)
def test_training_and_integer_forward_agree(name, integer, monkeypatch):
    config = CASES[name]
    tokens = random_tokens(config, SEQUENCES, LENGTH)
    found = integer_hidden(integer(config), tokens, config.kv_bits)
    assert agree(found, training_hidden(config, tokens, monkeypatch))


WRONG: dict[str, tuple[ModelConfig, dict]] = {
    "TopK off": (TINY, {"topk_fraction": 1.0}),
    "TopK of one less": (TINY, {"topk_fraction": 31.5 / 64}),
    "FP4 for INT4": (TINY, {"activation_format": "fp4"}),
    "INT8 for INT4": (TINY, {"variant": "b1.58"}),
    "INT4 for INT8": (VARIANTS["b1.58"], {"variant": "a4.8"}),
    "4-bit keys for 3-bit": (TINY, {"kv_bits": 4}),
    "float keys for 4-bit": (TINY.replace(kv_bits=4), {"kv_bits": 16}),
    "another eps": (TINY, {"rms_norm_eps": 1e-2}),
    "another theta": (TINY, {"rope_theta": 20000.0}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_forward_does_not_agree(name, integer, monkeypatch):
    config, changes = WRONG[name]
    tokens = random_tokens(config, SEQUENCES, LENGTH)
    found = integer_hidden(integer(config), tokens, config.kv_bits)
    assert not agree(found, training_hidden(config.replace(**changes), tokens, monkeypatch))


def test_a_bos_row_at_3_bits_does_not_agree(integer, monkeypatch):
    tokens = random_tokens(TINY, SEQUENCES, LENGTH)
    found = integer_hidden(integer(TINY), tokens, 3)
    monkeypatch.setattr(bitnet, "BOS_KV_BITS", 3)
    assert not agree(found, training_hidden(TINY, tokens, monkeypatch))


def test_float_attention_does_not_agree(integer, monkeypatch):
    """What training has; INT4 codes flip at once, and random weights show it (0.11 of the hidden
    state, half of what a wrong quantizer costs). test_zoo.py has the loss of the trained ones."""
    tokens = random_tokens(TINY, SEQUENCES, LENGTH)
    found = integer_hidden(integer(TINY), tokens, 3)
    trained = training_hidden(TINY, tokens, monkeypatch, F.scaled_dot_product_attention)
    assert not agree(found, trained)


@pytest.mark.parametrize("name", ["a4.8-int4-kv3", "untied", "b1.58", "llama"])
def test_the_head_is_off_by_its_input_quantizer_at_most(name, integer):
    """INT8 absmax moves each of the K inputs by half a step at the most, and so a logit by half a
    step times the sum of its row's |weights|; llama's head is float16 weights without quantizer."""
    config = CASES[name]
    model = integer(config)
    x = torch.randn(6, config.hidden_size, generator=torch.Generator().manual_seed(1)) * 3
    h = bitnet.RMSNorm(config.hidden_size, config.rms_norm_eps)
    h.weight.copy_(model.norm)
    head = model.embed if config.tie_word_embeddings else model.head
    weight = head.table.float() * (head.scale[:, None] if config.is_ternary else 1.0)
    half_step = h(x).abs().amax(-1, keepdim=True) / 127 / 2
    bound = half_step * weight.abs().sum(-1) * config.is_ternary + 1e-4
    error = (model.logits(x) - h(x) @ weight.T).abs()
    assert (error <= bound).all()
    if config.is_ternary:
        assert error.max() > 1e-3  # the quantizer is there


def prefill(model: IntegerModel, tokens: Tensor, kv_bits: int, caches=None):
    flat, slots, positions = rows_of(tokens)
    caches = caches or model.empty_caches(kv_bits, len(tokens), tokens.shape[1] + 4)
    step = Prefill(model, kv_bits)
    logits, caches = step(flat, slots, positions, torch.arange(len(flat)), caches)
    return logits.reshape(*tokens.shape, -1), caches


@pytest.mark.parametrize("kv_bits", [16, 4, 3])
@pytest.mark.parametrize("name", ["a4.8-int4", "b1.58", "llama"])
def test_prefill_then_decode_equals_token_by_token(name, kv_bits, integer):
    """All rows go through the same arithmetic; attention alone sums in another order, by 1e-7,
    which at this seed flips no code. The caches' codes are then equal bit for bit."""
    model = integer(VARIANTS[name])
    tokens = random_tokens(model.config, 1, 9, seed=5)
    whole, whole_caches = prefill(model, tokens, kv_bits, model.empty_caches(kv_bits, 1, 9))
    logits, caches = prefill(model, tokens[:, :4], kv_bits, model.empty_caches(kv_bits, 1, 9))
    assert torch.allclose(logits, whole[:, :4], atol=1e-4)
    for start, step_caches in ((4, caches), (0, model.empty_caches(kv_bits, 1, 9))):
        for t in range(start, 9):
            one, slot, position = tokens[0, t : t + 1], torch.tensor([0]), torch.tensor([t])
            step = Decode(model, kv_bits)
            logits, step_caches = step(one, slot, position, step_caches)
            assert torch.allclose(logits[0], whole[0, t], atol=1e-4)
        for found, expected in zip(step_caches, whole_caches, strict=True):
            if kv_bits == 16:
                assert torch.allclose(found.float(), expected.float(), rtol=2**-9, atol=1e-6)
            elif found.dtype == torch.uint8:
                assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["a4.8-int4", "a4.8-fp4", "b1.58", "llama"])
def test_many_slots_in_one_step_equal_one_at_a_time(name, integer):
    model = integer(VARIANTS[name])
    tokens = random_tokens(model.config, 3, 7, seed=6)
    together, caches = prefill(model, tokens, 3)
    next_tokens = torch.tensor([5, 6, 7])
    step, slots, positions = Decode(model, 3), torch.arange(3), torch.full((3,), 7)
    decoded, _ = step(next_tokens, slots, positions, caches)
    for i in range(3):
        alone, own = prefill(model, tokens[i : i + 1], 3)
        assert torch.allclose(alone[0], together[i], atol=1e-4)
        logits, _ = step(next_tokens[i : i + 1], torch.tensor([0]), positions[:1], own)
        assert torch.allclose(logits[0], decoded[i], atol=1e-4)


def test_rows_of_slots_may_be_mixed_and_chosen(integer):
    """A prompt of one slot beside a decode step of another, in turns; logits of two rows asked."""
    model = integer(TINY)
    tokens = random_tokens(TINY, 2, 6, seed=7)
    whole, _ = prefill(model, tokens, 3)
    _, caches = prefill(model, tokens[:, :5], 3)  # slot 0 is filled again below, slot 1 goes on
    flat = torch.stack([tokens[0, 0], tokens[1, 5], *tokens[0, 1:]])
    slots = torch.tensor([0, 1, 0, 0, 0, 0, 0])
    positions = torch.tensor([0, 5, 1, 2, 3, 4, 5])
    logits, _ = Prefill(model, 3)(flat, slots, positions, torch.tensor([6, 1]), caches)
    assert torch.allclose(logits, torch.stack([whole[0, 5], whole[1, 5]]), atol=1e-4)
