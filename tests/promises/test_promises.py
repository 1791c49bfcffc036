"""The standing promises, each by name. A failure here breaks what users were promised."""

import gc
from typing import Any

import pytest
import torch
from fast_path import assert_no_token_sees_the_future
from tiny_llama import make_tiny_llama, random_ids, random_rows
from torch._subclasses import FakeTensor

from transformerfam import FamConfig, FamState, convert
from transformerfam.fam.convert import fam_parameters

TOLERANCE = 1e-5
"""Float32 rounding over three layers of width 32 stays below 2e-6; a wrong key shows at 1e-2."""


def converted(num_layers: int = 3, **fields: Any) -> Any:
    config = FamConfig(**{"block_size": 8, "fam_length": 3, "num_memory_segments": 1, "fam_key_bias": 0.0} | fields)
    return convert(make_tiny_llama(num_layers), config)


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 37])
def test_any_split_gives_the_same_logits(num_tokens: int) -> None:
    """Catches a piece that forgets what an earlier chunk left in its block."""
    model, ids = converted(), random_ids(1, num_tokens)
    whole = model(input_ids=ids).logits
    for size in (1, 5, 8):
        state = model.init_state()
        parts = [model(input_ids=part, past_key_values=state).logits for part in ids.split(size, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_no_token_sees_the_future() -> None:
    """Catches a mask that lets a token see later ones of its block, or a FAM that is read before it is written."""
    assert_no_token_sees_the_future(converted(), TOLERANCE, least=100 * TOLERANCE)


def live_tensor_bytes() -> int:
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and not issubclass(type(t), FakeTensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@torch.no_grad()
def test_state_bytes_and_memory_are_constant_over_1000_blocks() -> None:
    """Catches a state that grows, and anything that keeps tensors of past blocks alive."""
    model = converted(num_layers=2, num_sink_tokens=2, num_previous_fams=2, fam_norm_bound=4.0)
    ids = random_ids(1, 8 * 1000)
    state = model.init_state()
    at_start = state.num_bytes
    model.read(ids[:, :160], state)
    early = live_tensor_bytes()
    model.read(ids[:, 160:], state)
    assert state.num_blocks == 1000
    assert state.num_tokens_read == 8000
    assert state.num_bytes == at_start
    assert live_tensor_bytes() <= early


@torch.no_grad()
@pytest.mark.parametrize("position", ["last", "fractional"])
@pytest.mark.parametrize("query", ["written", "current"])
def test_positions_0_and_10_million_agree(position: str, query: str) -> None:
    """Catches positions that grow with the text: float32 angles are off by 0.5 rad at 10 million tokens."""
    model = converted(fam_position=position, fam_query_position=query)
    state = model.read(random_ids(40, seed=1))
    far = state.fork()
    far.num_blocks_per_row = [10_000_000 // 8]
    far.position_offset = 10_000_000
    ids = random_ids(1, 20, seed=2)
    near = model(input_ids=ids, past_key_values=state).logits
    torch.testing.assert_close(model(input_ids=ids, past_key_values=far).logits, near, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_common_offset_is_felt_by_position_zero_alone() -> None:
    """Catches an offset that reaches positions `last` or `fractional`, or one that never reaches `zero`."""
    ids = random_ids(1, 20)
    for position, felt in (("last", False), ("fractional", False), ("zero", True)):
        model = converted(fam_position=position)
        logits = [
            model(input_ids=ids, past_key_values=model.init_state(position_offset=offset)).logits for offset in (0, 100)
        ]
        difference = (logits[0] - logits[1]).abs().max()
        assert (difference > 1e-3) == felt


@torch.no_grad()
def test_memory_off_and_wide_window_gives_base_logits() -> None:
    """Catches any change that conversion makes to the model beyond its window."""
    ids = random_ids(2, 50)
    base = make_tiny_llama(3)(ids).logits
    one_block = converted(block_size=64, fam_length=0, num_memory_segments=0)
    torch.testing.assert_close(one_block(input_ids=ids).logits, base, atol=TOLERANCE, rtol=0)
    blocks = converted(block_size=8, fam_length=0, num_memory_segments=7)
    torch.testing.assert_close(blocks(input_ids=ids).logits, base, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_gives_what_each_row_gives_alone(side: str) -> None:
    """Catches padding that is seen, counted or written to memory, and rows that lose their own place in the block."""
    model, lengths, width = converted(), (37, 20, 9), 37
    texts = [random_ids(1, n, seed=n) for n in lengths]
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(width - text.shape[1], width) if side == "left" else slice(0, text.shape[1])
        ids[row, place], mask[row, place] = text[0], 1
    output = model(input_ids=ids, attention_mask=mask)
    state = output.past_key_values
    assert state.row_lengths == lengths
    alone = [model(input_ids=text) for text in texts]
    for row, single in enumerate(alone):
        torch.testing.assert_close(output.logits[row][mask[row] == 1], single.logits[0], atol=TOLERANCE, rtol=0)
    for step in range(20):  # decode: every row meets its block boundary at another step
        token = random_ids(3, 1, seed=100 + step)
        together = model(input_ids=token, past_key_values=state).logits
        for row, single in enumerate(alone):
            expected = model(input_ids=token[row : row + 1], past_key_values=single.past_key_values).logits
            torch.testing.assert_close(together[row : row + 1], expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_save_and_load_change_nothing(tmp_path: Any) -> None:
    """Catches a part of the state that the file forgets."""
    model = converted(num_sink_tokens=2, num_previous_fams=2, fam_copy=False)
    state = model.read(random_ids(2, 45))
    state.save(tmp_path / "book.fam.safetensors")
    loaded = FamState.load(tmp_path / "book.fam.safetensors", model)
    assert loaded.row_lengths == state.row_lengths
    ids = random_ids(2, 30, seed=5)
    there = model(input_ids=ids, past_key_values=loaded).logits
    assert torch.equal(there, model(input_ids=ids, past_key_values=state).logits)


def blocks_with_gradient(model: Any, num_blocks: int) -> list[bool]:
    """Say which blocks' embeddings the last token's logits depend on, by gradient."""
    embeddings = random_rows(1, num_blocks * 8, 32).requires_grad_()
    model(inputs_embeds=embeddings).logits[0, -1].square().sum().backward()
    assert embeddings.grad is not None
    return [bool(block.abs().max() > 0) for block in embeddings.grad[0].split(8)]


def test_gradient_reaches_the_first_of_16_blocks_through_fam() -> None:
    """Catches a graph that is cut between blocks."""
    assert all(blocks_with_gradient(converted(num_memory_segments=0), 16))


@pytest.mark.parametrize("num_memory_segments", [1, 2])
def test_gradient_of_bswa_reaches_back_layers_times_m_blocks(num_memory_segments: int) -> None:
    """Catches gradients stopped at memory segments, which section 2.1 keeps, and windows that are too wide."""
    model = converted(num_layers=3, fam_length=0, num_memory_segments=num_memory_segments)
    reach = 3 * num_memory_segments
    assert blocks_with_gradient(model, 10) == [False] * (10 - 1 - reach) + [True] * (1 + reach)


def test_stop_gradient_keeps_the_gradient_in_its_block() -> None:
    """Catches a `stop_gradient` that cuts nothing."""
    model = converted(fam_length=0, stop_gradient=True)
    assert blocks_with_gradient(model, 6) == [False] * 5 + [True]


def test_gradient_reaches_the_prompt() -> None:
    """Catches an initial FAM that is detached from the prompt."""
    model = converted()
    model(input_ids=random_ids(1, 20)).logits.square().sum().backward()
    (prompt,) = fam_parameters(model)
    assert prompt.grad is not None
    assert (prompt.grad.abs().sum(-1) > 0).all()
