"""Compiled steps are the plain ones: the same outputs and states, one compilation, else the ordinary way.

Tests run the graph that torch.compile records without generating code for it, which takes seconds; `make prove` has the
default back end.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_llama import make_tiny_llama, random_ids
from torch._dynamo.testing import CompileCounter

from transformerfam import FamConfig, convert
from transformerfam.errors import TransformerFamError
from transformerfam.fam.compiled import compile_decoding, compile_reading, interpret

CONFIGS = {
    "fam": FamConfig(block_size=6, fam_length=2, num_memory_segments=0),
    "memory segments": FamConfig(block_size=5, fam_length=2, num_memory_segments=2, fam_key_bias=0.0),
    "sinks": FamConfig(block_size=5, fam_length=0, num_memory_segments=1, num_sink_tokens=2),
    "window": FamConfig(block_size=5, fam_length=2, num_memory_segments=1, window=3, num_previous_fams=2),
    "one layer": FamConfig(block_size=5, fam_length=2, num_memory_segments=1, fam_layers=(1,)),
    "static": FamConfig(block_size=5, fam_length=2, num_memory_segments=1, fam_copy=False),
    "gated slots": FamConfig.preset("gated", block_size=5, fam_length=2, num_memory_segments=1, num_sink_tokens=1),
    "starts empty": FamConfig.preset(
        "gated", block_size=5, fam_length=2, num_memory_segments=0, num_sink_tokens=1, fam_starts_empty=True
    ),
    "gated": FamConfig.preset("gated_rows", block_size=5, fam_length=2, num_memory_segments=1, num_sink_tokens=1),
    "gated, with a mask": FamConfig(
        block_size=5, fam_length=2, num_memory_segments=1, fam_update="gated", fam_key_bias=-1.0
    ),
}


def make_pair(config: FamConfig) -> tuple[Any, Any]:
    """Return two models of the same weights, in float64, where rounding is far below what a wrong slot does."""
    return tuple(convert(make_tiny_llama(), config).double() for _ in range(2))


def assert_reads_alike(plain: Any, compiled: Any, ids: torch.Tensor, lengths: Sequence[int]) -> None:
    """Read the same chunks with both models, and compare what they predict and what they carry in the end."""
    states = [plain.init_state(len(ids)), compiled.init_state(len(ids))]
    for chunk in ids.split(lengths, dim=1):
        expected, found = (
            model(input_ids=chunk, past_key_values=state).logits
            for model, state in zip((plain, compiled), states, strict=True)
        )
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for expected_layer, found_layer in zip(states[0].layers, states[1].layers, strict=True):
        for name, tensor in expected_layer.tensors().items():
            torch.testing.assert_close(found_layer.tensors()[name], tensor, atol=1e-6, rtol=0)


IN_BLOCKS = ("fam", "memory segments", "gated slots", "gated, with a mask")
"""The fast tests compile these blocks, and the other configurations' tokens one by one; `make prove` compiles all."""


def of_fast(name: str, is_fast: bool, *more: str) -> Any:
    return pytest.param(name, *more, marks=[] if is_fast else pytest.mark.slow)


@torch.no_grad()
@pytest.mark.parametrize("name", [of_fast(name, name not in IN_BLOCKS or name == "gated slots") for name in CONFIGS])
def test_compiled_tokens_match_and_are_compiled_once(name: str) -> None:
    """Catches a slot written wrongly, an empty slot that is seen, and shapes that change from block to block."""
    plain, compiled = make_pair(CONFIGS[name])
    counter = CompileCounter()
    compile_decoding(compiled, batch_size=2, backend=counter)
    assert_reads_alike(plain, compiled, random_ids(2, 33), (3, *[1] * 20, 8, 1, 1))
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "back_end"),
    [
        *(of_fast(name, name in IN_BLOCKS, "fam") for name in CONFIGS),
        *(of_fast(name, name == "fam", "sdpa") for name in CONFIGS),
    ],
)
def test_compiled_blocks_match_and_are_compiled_once(name: str, back_end: str) -> None:
    """Catches a FAM that is not updated in the graph, a mask of another block, and shapes that change."""
    if back_end == "sdpa" and CONFIGS[name].fam_update == "gated":
        back_end = "eager"  # sdpa gives no weights
    plain, compiled = make_pair(CONFIGS[name])
    counter = CompileCounter()
    for model in (plain, compiled):
        model.set_attn_implementation(back_end)
    compile_reading(compiled, batch_size=2, backend=counter)
    for seed in range(2):  # two readings
        assert_reads_alike(plain, compiled, random_ids(2, 49, seed=seed), (3, 17, 29))
    assert counter.frame_count == 1


@torch.no_grad()
def test_sequences_at_different_places_share_the_compiled_step() -> None:
    """Catches sequences that write each other's slots where padding has put them at different places."""
    plain, compiled = make_pair(CONFIGS["memory segments"])
    counter = CompileCounter()
    compile_decoding(compiled, batch_size=2, backend=counter)
    ids = random_ids(2, 24)
    padding = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    states = [plain.init_state(2), compiled.init_state(2)]
    for position, chunk in enumerate(ids.split((4, *[1] * 20), dim=1)):
        expected, found = (
            model(input_ids=chunk, past_key_values=state, attention_mask=None if position else padding).logits[:, -1]
            for model, state in zip((plain, compiled), states, strict=True)
        )
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert states[1].block_fill[0] != states[1].block_fill[1]
    assert counter.frame_count == 1


def test_what_is_not_compiled_goes_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches compiled steps that write in place under a gradient, drop hidden states, or run after being undone."""
    model = make_pair(CONFIGS["fam"])[1]
    compile_decoding(model, backend="eager")
    compile_reading(model, backend="eager")
    compile_decoding(model, backend="eager")  # again: it replaces the first
    num_steps = 0
    step, _ = model.get_decoder().fam.compiled_steps
    original = step.run

    def counted(*args: Any) -> torch.Tensor:
        nonlocal num_steps
        num_steps += 1
        return original(*args)

    monkeypatch.setattr(step, "run", counted)
    state, token = model.init_state(), random_ids(1, 1)

    def decode(**kwargs: Any) -> int:
        before = num_steps
        model(input_ids=token, past_key_values=state, **kwargs)
        return num_steps - before

    with torch.no_grad():
        assert [decode() for _ in range(7)] == [0, 1, 1, 1, 1, 0, 0]
        assert decode(output_hidden_states=True) == 0
        model(input_ids=random_ids(2, 1), past_key_values=model.init_state(2))
    before = num_steps
    loss = model(input_ids=token, past_key_values=state).logits.sum()
    assert num_steps == before
    assert any(layer.keys.requires_grad for layer in state.layers)
    with torch.no_grad():
        assert decode() == 1  # on copies: what the graph needs stays as it was
    loss.backward()
    assert not any(layer.keys.requires_grad for layer in state.layers)
    with torch.no_grad():
        assert decode() == 1
        interpret(model)
        assert decode() == 0


@torch.no_grad()
def test_generate_is_the_same_when_compiled() -> None:
    """Catches a cache that generate and the compiled step understand differently."""
    plain, compiled = make_pair(CONFIGS["fam"])
    compile_decoding(compiled, backend="eager")
    compile_reading(compiled, backend="eager")
    ids = random_ids(1, 29)
    expected, found = (
        model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None) for model in (plain, compiled)
    )
    assert found.tolist() == expected.tolist()


def test_what_cannot_be_compiled_says_so() -> None:
    """Catches a model left half compiled, and an error without a way out."""
    with pytest.raises(TransformerFamError, match="call convert"):
        compile_decoding(make_tiny_llama())
    with pytest.raises(TransformerFamError, match="block_size is 2, required for compiled decoding is at least 3"):
        compile_decoding(convert(make_tiny_llama(), FamConfig(block_size=2, fam_length=1, num_memory_segments=0)))

    def fails(*args: Any) -> Any:
        raise RuntimeError("no compiler")

    model: Any = make_pair(CONFIGS["fam"])[1]
    for compile_step in (compile_decoding, compile_reading):
        with pytest.raises(TransformerFamError, match=r"cannot be compiled here: .*no compiler.*works as before"):
            compile_step(model, backend=fails)
        assert model.get_decoder().fam.compiled_steps == []
    model(input_ids=random_ids(1, 8))


@torch.no_grad()
@pytest.mark.parametrize("name", ["fam", "memory segments", "gated slots"])
def test_model_compiled_as_a_whole_reads_as_it_is(name: str) -> None:
    """Catches a graph of one piece that is taken for another, whose FAM has been updated more often."""
    plain, compiled = make_pair(CONFIGS[name])
    counter = CompileCounter()
    whole = torch.compile(compiled, backend=counter)
    ids = random_ids(2, 33)
    for _ in range(2):
        assert torch.equal(whole(input_ids=ids).logits, plain(input_ids=ids).logits)
    states = [plain.init_state(2), compiled.init_state(2)]
    for chunk in ids.split((3, 1, 1, 20, 8), dim=1):
        expected, found = (
            model(input_ids=chunk, past_key_values=state).logits
            for model, state in zip((plain, whole), states, strict=True)
        )
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert counter.frame_count <= 4  # what is around the decoder, and none of its pieces


@torch.no_grad()
def test_compiled_steps_serve_a_model_that_is_compiled_as_a_whole() -> None:
    """Catches steps that are switched off where the decoder is left as it is."""
    plain, compiled = make_pair(CONFIGS["fam"])
    counter = CompileCounter()
    compile_decoding(compiled, batch_size=2, backend=counter)
    compiled.compile(backend="eager")
    assert_reads_alike(plain, compiled, random_ids(2, 20), (3, *[1] * 17))
    assert counter.frame_count == 1
