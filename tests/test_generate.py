"""`generate()` of a converted model: every strategy continues exactly what reading gives."""

from typing import Any

import pytest
import torch
from tiny_llama import make_tiny_llama, random_ids
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from transformerfam import FamConfig, convert
from transformerfam.errors import StateMismatchError, TransformerFamError

NUM_NEW = 20
"""More than two blocks, so that generation writes and reads memory."""


@pytest.fixture
def model() -> Any:
    return convert(make_tiny_llama(), FamConfig(fam_key_bias=0.0, block_size=8, fam_length=3, num_memory_segments=1))


@torch.no_grad()
def continue_greedily(model: Any, ids: torch.Tensor, state: Any) -> list[int]:
    """Feed whatever is likeliest, token by token, without `generate`."""
    tokens: list[int] = []
    while len(tokens) < NUM_NEW:
        ids = model(input_ids=ids, past_key_values=state).logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens


@pytest.mark.parametrize("prompt_length", [1, 7, 8, 9, 21])
def test_greedy_generation_equals_token_by_token(model: Any, prompt_length: int) -> None:
    """Catches generation that forgets, repeats or shifts what the state holds; with and without a reading before."""
    ids = random_ids(1, prompt_length)
    reading = model.read(random_ids(1, 29, seed=4))
    for state in (model.init_state(), reading):
        expected = continue_greedily(model, ids, state.fork())
        output = model.generate(ids, past_key_values=state.fork(), max_new_tokens=NUM_NEW, do_sample=False)
        assert output[0, prompt_length:].tolist() == expected
    without_state = model.generate(ids, max_new_tokens=NUM_NEW, do_sample=False)
    assert without_state[0, prompt_length:].tolist() == continue_greedily(model, ids, model.init_state())


def test_generation_leaves_a_forked_reading_alone(model: Any) -> None:
    reading = model.read(random_ids(29))
    before = reading.fams.clone()
    model.generate(random_ids(1, 5), past_key_values=reading.fork(), max_new_tokens=NUM_NEW)
    assert torch.equal(reading.fams, before)
    assert reading.num_tokens_read == 29


def test_sampling_depends_on_the_seed_alone(model: Any) -> None:
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model.generate(random_ids(1, 5), do_sample=True, max_new_tokens=NUM_NEW, num_return_sequences=2))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@torch.no_grad()
def test_beams_find_a_likelier_text_and_score_it_right(model: Any) -> None:
    """Catches beams whose states are not reordered with them: their scores would not be those of their own text."""
    ids, reading = random_ids(1, 9), model.read(random_ids(1, 30, seed=3))
    output = model.generate(
        ids,
        past_key_values=reading.fork(),
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=NUM_NEW,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for sequence, score in zip(output.sequences, output.sequences_scores, strict=True):
        logits = model(input_ids=sequence[None, :-1], past_key_values=reading.fork()).logits[0, len(ids[0]) - 1 :]
        own = logits.log_softmax(-1).gather(1, sequence[len(ids[0]) :, None]).sum()
        torch.testing.assert_close(own, score, atol=1e-3, rtol=0)


def test_streamer_gets_every_token(model: Any) -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            pass

    streamer = Collector()
    output = model.generate(random_ids(1, 5), streamer=streamer, max_new_tokens=NUM_NEW, do_sample=False)
    assert streamer.tokens == output[0].tolist()


def test_padded_batch_generates_what_each_row_does_alone(model: Any) -> None:
    """Catches rows that share a block phase while decoding."""
    lengths, width = (15, 4, 8), 15
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    texts = [random_ids(1, n, seed=n) for n in lengths]
    for row, text in enumerate(texts):
        ids[row, width - text.shape[1] :], mask[row, width - text.shape[1] :] = text[0], 1
    together = model.generate(ids, attention_mask=mask, max_new_tokens=NUM_NEW, do_sample=False)
    for row, text in enumerate(texts):
        alone = model.generate(text, max_new_tokens=NUM_NEW, do_sample=False)
        assert together[row, width:].tolist() == alone[0, text.shape[1] :].tolist()


def test_prefill_in_chunks_changes_nothing(model: Any) -> None:
    ids = random_ids(1, 30)
    whole = model.generate(ids, max_new_tokens=NUM_NEW, do_sample=False)
    chunked = model.generate(ids, max_new_tokens=NUM_NEW, do_sample=False, prefill_chunk_size=7)
    assert torch.equal(whole, chunked)


def test_cache_of_another_kind_is_refused(model: Any) -> None:
    with pytest.raises(StateMismatchError, match="past_key_values is a DynamicCache, required is a FamState"):
        model.generate(random_ids(1, 5), past_key_values=DynamicCache(), max_new_tokens=2)
    with pytest.raises(TransformerFamError, match="cache_implementation is 'static', required is None"):
        model.generate(random_ids(1, 5), cache_implementation="static", max_new_tokens=2)


def test_strategy_that_crops_is_refused(model: Any) -> None:
    with pytest.raises(TransformerFamError, match=r"cannot take back \d+ tokens"):
        model.generate(random_ids(1, 25), prompt_lookup_num_tokens=4, max_new_tokens=NUM_NEW)
