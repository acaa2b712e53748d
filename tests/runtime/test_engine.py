"""The engine on the fake model, whose logits say what follows (fake_model.py)."""

import gc
import threading

import numpy as np
import pytest
from fake_artifact import write_manifest
from fake_model import CONTEXT, PEAK, V

from runtime import Engine, RuntimeRefusal, host, tvm_runtime
from runtime import engine as engine_module
from runtime.sampler import Sampler


def follows(token: int, first: int = 0) -> int:
    return (token + 1 + first) % V


def text_of(*tokens: int) -> str:
    return bytes(token - 2 for token in tokens).decode("utf-8", "replace")


@pytest.mark.parametrize("bits", [16, 4, 3])
def test_continues_a_prompt(artifact, bits):
    engine = Engine.load(artifact, kv_bits=bits, threads=1)
    generation = engine.generate("abc", max_new_tokens=5, temperature=0)
    assert "".join(generation) == "defgh"
    assert generation.finish == "length"
    assert generation.prompt == engine.encode("abc") == [0, 99, 100, 101]
    assert generation.tokens == [102, 103, 104, 105, 106]
    assert generation.decode_steps == 4
    assert generation.prefill_seconds > 0 and generation.decode_seconds > 0


def test_prompt_of_token_ids_is_taken_as_it_is(engine):
    generation = engine.generate([3, 10], max_new_tokens=3, temperature=0)
    assert list(generation) and generation.tokens == [14, 18, 22]  # in fours: first is 3


def test_stops_at_eos(engine):
    generation = engine.generate([0, V - 3], max_new_tokens=99, temperature=0)
    list(generation)
    assert generation.tokens == [V - 2, V - 1, 0] and generation.finish == "eos"


@pytest.mark.parametrize("length", [CONTEXT - 3, CONTEXT - 1, CONTEXT])
def test_stops_when_the_context_is_full(engine, length):
    """The last position's token is drawn too, though it cannot be read any more."""
    generation = engine.generate([0] + [2] * (length - 1), max_new_tokens=99, temperature=0)
    list(generation)
    assert generation.finish == "context"
    assert len(generation.prompt) + len(generation.tokens) == CONTEXT + 1


def test_characters_of_several_bytes_come_whole(engine, monkeypatch):
    tokens = [2 + byte for byte in "né, 漢字 🙂!".encode()]
    drawn = iter(tokens)
    generation = engine.generate("x", max_new_tokens=len(tokens))
    monkeypatch.setattr(generation.sampler, "sample", lambda logits, uniform=None: next(drawn))
    assert list(generation) == list("né, 漢字 🙂!")


def test_seed_reproduces(engine):
    def run(seed):
        generation = engine.generate("abc", max_new_tokens=30, temperature=2.0, top_k=0, seed=seed)
        list(generation)
        return generation.tokens

    assert run(1) == run(1) != run(2)


def test_prefill_in_chunks_is_prefill(engine, monkeypatch):
    ids = [0, *range(20, 60)]
    engine.cache.arrays[0][:] = 0
    whole = engine.prefill(ids)
    cache = [array.copy() for array in engine.cache.arrays]
    monkeypatch.setattr(engine_module, "PREFILL_ROWS", 7)
    engine.cache.arrays[0][:] = 0
    np.testing.assert_array_equal(engine.prefill(ids), whole)
    assert int(whole.argmax()) == follows(59) and whole.max() == PEAK
    for found, expected in zip(engine.cache.arrays, cache, strict=True):
        np.testing.assert_array_equal(found[0], expected[0])


def test_prefill_goes_on_where_it_was(engine):
    engine.prefill([5, 6], slot=1)
    assert int(engine.prefill([7, 8], slot=1, start=2).argmax()) == follows(8, first=5)


def test_score_gives_every_row(engine, monkeypatch):
    monkeypatch.setattr(engine_module, "SCORE_ROWS", 4)
    ids = [0, 7, 30, 31, 9, 200, 100]
    logits = engine.score(ids)
    assert logits.shape == (7, V)
    assert logits.argmax(axis=1).tolist() == [follows(token) for token in ids]
    assert [start for start, _ in engine.score_chunks(ids)] == [0, 4]


def test_decode_steps_of_several_slots(engine):
    for slot, first in enumerate((0, 3, 9)):
        engine.prefill([first], slot)
    logits = engine.decode([10, 10, 20, 11], [2, 0, 1, 2], [1, 1, 1, 2])
    assert logits.argmax(axis=1).tolist() == [20, 11, 24, 21]


def test_slots_are_taken_while_generating_and_given_back(engine):
    running = [engine.generate("abc", max_new_tokens=9, temperature=0) for _ in range(3)]
    assert [next(generation) for generation in running] == ["d"] * 3
    with pytest.raises(RuntimeRefusal, match="all 3 are taken"):
        next(engine.generate("abc"))
    running[1].close()
    assert running[1].finish == "closed" and list(running[1]) == []
    assert "".join(engine.generate("xy", max_new_tokens=2, temperature=0)) == "z{"
    assert "".join(running[0]) == "efghijkl"
    del running
    gc.collect()
    assert engine.cache.free_slots == 3


def test_sparsity_where_it_is_recorded(artifact, engine):
    assert engine.sparsity([0], [0], [0]) is None
    recorded = Engine.load(artifact, kv_bits=16, threads=1)
    np.testing.assert_allclose(recorded.sparsity([0], [0], [0]), [[0, 0.5], [0.1, 0.6]], rtol=1e-6)


def test_context_can_be_shorter(artifact):
    engine = Engine.load(artifact, context=8, threads=1)
    assert engine.cache.nbytes() < Engine.load(artifact, threads=1).cache.nbytes()
    with pytest.raises(RuntimeRefusal, match="it has 9 tokens; the context holds 8"):
        engine.generate("a" * 8)


def test_without_a_tokenizer(own_artifact):
    (own_artifact / "tokenizer.json").unlink()
    write_manifest(own_artifact)
    engine = Engine.load(own_artifact, threads=1)
    assert int(engine.prefill([0, 5]).argmax()) == follows(5)
    with pytest.raises(RuntimeRefusal, match=r"it has no tokenizer\.json; possible"):
        engine.generate([0, 5])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kv_bits": 5}, "kv-bits: asked for 5 of .*; possible: 16, 4, 3"),
        ({"threads": 0}, "threads: asked for 0; possible: 1 to"),
        ({"threads": 100_000}, f"threads: asked for 100000; possible: 1 to {host.usable_cpus()}"),
        ({"context": 0}, "context: asked for 0; possible: 1 to 64"),
        ({"context": 65}, "context: asked for 65; possible: 1 to 64"),
        ({"slots": 0}, "slots: asked for 0"),
        ({"slots": 2.5}, "slots: asked for 2.5"),
    ],
)
def test_load_refuses(artifact, options, message):
    with pytest.raises(RuntimeRefusal, match=message):
        Engine.load(artifact, **options)


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ("", {}, "prompt: it is empty"),
        ([], {}, "prompt: it has no tokens"),
        ("a\udcff", {}, "not valid UTF-8 at character 1"),
        ("a" * 64, {}, "it has 65 tokens; the context holds 64"),
        ([0, V], {}, f"token ids: asked for {V}; possible: 0 to {V - 1}"),
        ([0, -1], {}, "token ids: asked for -1"),
        ([0, 1.5], {}, "whole numbers"),
        ("a", {"max_new_tokens": 0}, "max-new-tokens: asked for 0"),
        ("a", {"temperature": -1}, "temperature: asked for -1"),
    ],
)
def test_generate_refuses(engine, prompt, options, message):
    with pytest.raises(RuntimeRefusal, match=message):
        engine.generate(prompt, **options)


@pytest.mark.parametrize(
    "rows, message",
    [
        (([], [], []), "at least one"),
        (([1], [0, 1], [0]), "1 tokens, 2 slots, 1 positions"),
        (([V], [0], [0]), f"token ids: asked for {V}"),
        (([1], [3], [0]), "slots: asked for 3; possible: 0 to 2"),
        (([1], [0], [CONTEXT]), "positions: asked for 64; possible: 0 to 63"),
        (([1, 1], [0, 0], [4, 4]), "must rise"),
        (([1, 1, 1], [0, 1, 0], [4, 0, 3]), "must rise"),
    ],
)
def test_decode_refuses(engine, rows, message):
    with pytest.raises(RuntimeRefusal, match=message):
        engine.decode(*rows)


@pytest.mark.parametrize(
    "slot, start, message",
    [
        (3, 0, "slots: asked for 3; possible: 0 to 2"),
        (-1, 0, "slots: asked for -1"),
        (0, -1, "positions: asked for -1; possible: 0 to 63"),
        (0, CONTEXT - 1, "it has 2 tokens after 63 before it; the context holds 64"),
    ],
)
def test_prefill_refuses(engine, slot, start, message):
    with pytest.raises(RuntimeRefusal, match=message):
        engine.prefill([0, 1], slot, start)


def test_one_row_is_checked_as_several_are(engine):
    """What a step that draws its token is asked for."""
    assert engine._check_row(5, 2, 63) == (5, 2, 63)
    found = engine._check_row(np.int64(5), np.int32(2), 63)
    assert found == (5, 2, 63) and {type(value) for value in found} == {int}
    for row in ((V, 0, 0), (-1, 0, 0), (0, 3, 0), (0, 0, CONTEXT), (0.5, 0, 0)):
        with pytest.raises(RuntimeRefusal) as one:
            engine._check_row(*row)
        with pytest.raises(RuntimeRefusal) as several:
            engine.decode(*([value] for value in row))
        assert str(one.value) == str(several.value)


def test_threads_are_those_of_the_engine(artifact):
    most = host.usable_cpus()
    one, all_ = Engine.load(artifact, threads=1), Engine.load(artifact)
    assert all_.threads == most
    for engine in (one, all_, one):
        engine.prefill([0, 1])
        assert tvm_runtime.num_threads() == engine.threads


def test_another_thread_uses_as_many(artifact):
    """TVM's pool is one of each calling thread, and by default narrower."""
    engine, found = Engine.load(artifact), []

    def run():
        engine.prefill([0, 1])
        found.append(tvm_runtime.num_threads())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [host.usable_cpus()]


def test_a_pool_that_could_not_be_filled_is_filled_at_the_next_step(artifact, monkeypatch):
    """A step captured without it would blame the library."""
    engine, asked = Engine.load(artifact, threads=1), []

    def fill(_module, name, _arguments):
        asked.append(name)
        if len(asked) == 1:
            raise RuntimeError("CUDAError: out of memory")

    monkeypatch.setattr(tvm_runtime, "fill_pool", fill)
    with pytest.raises(RuntimeRefusal, match=r"out of memory"):
        engine.decode([0], [0], [0])
    for _ in range(2):
        engine.decode([0], [0], [0])
    assert len(asked) == 2
    engine.decode([0, 1], [0, 0], [1, 2])
    assert len(asked) == 3


def test_a_step_that_ends_badly(artifact, monkeypatch):
    """A GPU tells what went wrong in a step when its result is fetched."""
    engine = Engine.load(artifact, threads=1)

    def fail(_tensor):
        raise RuntimeError("CUDAError: an illegal memory access was encountered")

    monkeypatch.setattr(engine.cache.device, "fetch", fail)
    with pytest.raises(RuntimeRefusal, match=r"did not end well: .*illegal.*; possible: to load"):
        engine.decode([0], [0], [0])


def test_a_step_after_one_that_failed(artifact, monkeypatch):
    """Where a launch failed, the next request waits for it and meets the same error."""
    engine = Engine.load(artifact, threads=1)

    class Mailbox:
        tensors = ()

        def ask(self, *_):
            raise RuntimeError("CUDAError: an illegal memory access was encountered")

    monkeypatch.setattr(engine, "_mailbox", Mailbox())
    with pytest.raises(RuntimeRefusal, match=r"did not end well: .*illegal"):
        engine.decode_token(0, 0, 0, Sampler(temperature=0))
