"""`generate()` of a converted model: every strategy continues exactly what reading gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import make_tiny_llama, random_ids
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from transformerfam import FamConfig, FamState, convert
from transformerfam.decoder.cache_argument import CACHE_NAME
from transformerfam.errors import StateMismatchError, TransformerFamError
from transformerfam.rivals import RivalConfig, attach

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
    with pytest.raises(StateMismatchError, match=f"{CACHE_NAME} is a DynamicCache, required is a FamState"):
        model.generate(random_ids(1, 5), past_key_values=DynamicCache(), max_new_tokens=2)
    with pytest.raises(TransformerFamError, match="cache_implementation is 'static', required is None"):
        model.generate(random_ids(1, 5), cache_implementation="static", max_new_tokens=2)


ASSISTED: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "another model": {"assistant_model": make_tiny_llama(1, seed=1)},
    "the base model": {"assistant_model": make_tiny_llama()},
}


@pytest.mark.parametrize("name", ASSISTED)
@pytest.mark.parametrize("num_read", [0, 30])
def test_assisted_decoding_takes_back_what_was_not_accepted(model: Any, name: str, num_read: int) -> None:
    """Catches candidates that stay in the memory, at any place in a block, and a reading that is not gone on from."""
    ids = random_ids(1, 5).repeat(1, 4)  # for prompt lookup to find something
    states = [model.read(random_ids(num_read)) if num_read else model.init_state() for _ in range(2)]
    greedy = {"do_sample": False, "max_new_tokens": NUM_NEW}
    expected = model.generate(ids, past_key_values=states[0], **greedy)
    found = model.generate(ids, past_key_values=states[1], **greedy, **ASSISTED[name])
    assert torch.equal(found, expected)
    assert states[1].num_tokens_read >= num_read + ids.shape[1] + NUM_NEW - 1
    lengths = [state.num_tokens_read for state in states]
    if lengths[0] == lengths[1]:
        torch.testing.assert_close(states[1].fams, states[0].fams)


@pytest.mark.parametrize("name", ["assistant_early_exit", "use_mtp"])
def test_drafts_of_the_model_itself_are_refused_before_it_is_changed(model: Any, name: str) -> None:
    """Catches an error amid a draft, which left the model with one layer."""
    num_layers = model.config.num_hidden_layers
    with pytest.raises(TransformerFamError, match=f"{name} is 1, required is None"):
        model.generate(random_ids(1, 5), **{name: 1}, max_new_tokens=2, do_sample=False)
    assert model.config.num_hidden_layers == num_layers


@torch.no_grad()
@pytest.mark.parametrize("num_removed", [1, 3, 8, 11])
def test_crop_reads_what_is_left_again(model: Any, num_removed: int) -> None:
    """Catches a fork that is not taken, and tokens that are read twice."""
    ids, more = random_ids(2, 13), random_ids(2, 11, seed=1)
    state = model.read(ids)
    state.activate_past_recording()
    model.read(more[:, :2], state)
    model(input_ids=more, past_key_values=state)
    state.crop(-num_removed)
    expected = model.read(torch.cat((ids, more[:, :2], more[:, : 11 - num_removed]), dim=1))
    assert state.row_lengths == expected.row_lengths
    for found, required in zip(state.layers, expected.layers, strict=True):
        torch.testing.assert_close(found.fam, required.fam)
        kept = required.sections.block + expected.block_fill[0]
        torch.testing.assert_close(found.keys[:, :, :kept], required.keys[:, :, :kept])


def test_crop_without_a_recording_is_refused(model: Any) -> None:
    state = model.read(random_ids(20))
    with pytest.raises(TransformerFamError, match="cannot take back 3 tokens"):
        state.crop(-3)
    state.activate_past_recording()
    model.read(random_ids(2), state)
    with pytest.raises(TransformerFamError, match="cannot take back 3 tokens"):
        state.crop(-3)


STRATEGIES: dict[str, dict[str, Any]] = {
    "sampling from the likeliest": {"do_sample": True, "top_k": 5, "top_p": 0.9, "temperature": 0.7},
    "beams that sample": {"do_sample": True, "num_beams": 3},
    "no repeats": {"do_sample": False, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    "beams with early stopping": {"num_beams": 2, "early_stopping": True, "do_sample": False},
    "bad words": {"do_sample": False, "bad_words_ids": [[3], [4, 5]]},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_equals_that_of_a_model_that_reads_all_again(model: Any, name: str) -> None:
    """Catches a strategy whose sequences lose their state, or get each other's."""
    ids = random_ids(1, 11)
    outputs = []
    for use_cache in (True, False):  # without one every step reads the whole text again
        torch.manual_seed(0)
        outputs.append(model.generate(ids, max_new_tokens=NUM_NEW, use_cache=use_cache, **STRATEGIES[name]))
    assert torch.equal(outputs[0], outputs[1])


GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9}


def same_states(found: Any, required: Any) -> None:
    assert found.row_lengths == required.row_lengths
    for one, other in zip(found.layers, required.layers, strict=True):
        torch.testing.assert_close(one.fam, other.fam)


@pytest.mark.parametrize("num_read", [3, 8, 29])
def test_history_that_is_passed_again_is_not_read_again(model: Any, num_read: int) -> None:
    """Catches a text that is read twice: transformers continues one by passing it from its beginning."""
    text = random_ids(1, num_read + 6)
    state = model.read(text[:, :num_read])
    assert state.get_seq_length() == state.num_tokens_read == num_read
    expected = model.generate(text, **GREEDY)
    assert torch.equal(model.generate(text, past_key_values=state, **GREEDY), expected)
    assert state.get_seq_length() == expected.shape[1] - 1
    more = torch.cat((expected, random_ids(1, 4, seed=3)), dim=1)
    assert torch.equal(model.generate(more, past_key_values=state, **GREEDY), model.generate(more, **GREEDY))
    again = model.generate(more, past_key_values=model.read(more[:, :-1]), prefill_chunk_size=3, **GREEDY)
    assert torch.equal(again, model.generate(more, **GREEDY))


def test_new_tokens_alone_follow_the_last_generated_one(model: Any, tmp_path: Path) -> None:
    """Catches the last token of an answer that no state ever reads, through forks, selections and files."""
    text, question = random_ids(1, 13), random_ids(1, 5, seed=1)
    state = model.init_state()
    answered = model.generate(text, past_key_values=state, **GREEDY)
    assert state.unread_ids == [int(answered[0, -1])]
    whole = torch.cat((answered, question), dim=1)
    expected = model.generate(whole, **GREEDY)[:, whole.shape[1] :]
    state.save(tmp_path / "state")
    for one in (state.fork(), state.select([0]), FamState.load(tmp_path / "state", model)):
        assert torch.equal(model.generate(question, past_key_values=one, **GREEDY)[:, 5:], expected)
        same_states(one, model.read(torch.cat((whole, expected[:, :-1]), dim=1)))
    embedded = model.get_input_embeddings()(question)
    found = model.generate(inputs_embeds=embedded, past_key_values=state, **GREEDY)
    assert torch.equal(found, expected)
    assert state.unread_ids == [int(expected[0, -1])]


def test_row_that_ends_early_stays_as_it_was_at_its_end(model: Any) -> None:
    """Catches padding after an end that is read as text, and a next turn that follows it."""
    ids = random_ids(2, 11).clamp(min=1)  # 0 is padding
    alone = [model.generate(row[None], max_new_tokens=NUM_NEW, do_sample=False) for row in ids]
    end = int(alone[0][0, 11 + 4])
    options = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    states = [model.init_state() for _ in ids]
    expected = [
        model.generate(row[None], past_key_values=state, **options) for row, state in zip(ids, states, strict=True)
    ]
    assert expected[0].shape[1] < expected[1].shape[1]
    together = model.init_state(2)
    found = model.generate(ids, past_key_values=together, **options)
    for row, (text, state) in enumerate(zip(expected, states, strict=True)):
        assert found[row, : text.shape[1]].tolist() == text[0].tolist()
        same_states(together.select([row]), state)
    assert together.unread_ids == [state.unread_ids[0] for state in states]
    more = random_ids(2, 3, seed=2)
    both = model.generate(more, past_key_values=together.fork(), **GREEDY)
    for row, state in enumerate(states):
        assert torch.equal(both[row], model.generate(more[row, None], past_key_values=state, **GREEDY)[0])
    mask = torch.ones(2, found.shape[1] + 3, dtype=torch.long)
    mask[0, expected[0].shape[1] : found.shape[1]] = 0
    whole = torch.cat((found, more), dim=1)
    assert torch.equal(
        model.generate(whole, attention_mask=mask, past_key_values=together, **GREEDY)[:, whole.shape[1] :], both[:, 3:]
    )


def test_input_of_which_it_cannot_be_told_what_was_read_is_refused(model: Any) -> None:
    """Catches a guess where there are two readings of an input."""
    text = random_ids(2, 12)
    state = model.read(text)
    with pytest.raises(StateMismatchError, match="the input is the 12 tokens that the state has read"):
        model.generate(text, past_key_values=state.fork(), **GREEDY)
    longer = torch.cat((text, random_ids(2, 2)), dim=1)
    longer[1, 3] = (longer[1, 3] + 1) % 61
    with pytest.raises(StateMismatchError, match="some rows of the input begin with"):
        model.generate(longer, past_key_values=state.fork(), **GREEDY)
    unknown = model.init_state(2)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(text), past_key_values=unknown)
    with pytest.raises(StateMismatchError, match="it does not know the ids"):
        model.generate(longer, past_key_values=unknown, **GREEDY)
    beams = model.init_state()
    model.generate(text[:1], past_key_values=beams, num_beams=2, **GREEDY)
    with pytest.raises(StateMismatchError, match="left by beam search"):
        model.generate(text[:1], past_key_values=beams, **GREEDY)
    with pytest.raises(TransformerFamError, match="use_cache is False and"):
        model.generate(text, past_key_values=state, use_cache=False, **GREEDY)
    assert state.get_seq_length() == 12


@pytest.mark.parametrize("system", ["fam", "rmt"])
@torch.no_grad()
def test_state_left_by_beams_is_known_as_such_wherever_it_goes(system: str, tmp_path: Path) -> None:
    """Catches a reading that continues with beams which the text that was returned did not go through."""
    text = random_ids(1, 12)
    built: Any = (
        convert(make_tiny_llama(), FamConfig(block_size=8, fam_length=2))
        if system == "fam"
        else attach(make_tiny_llama(), RivalConfig(system=system, block_size=8))
    )
    beams = built.init_state()
    built.generate(text, past_key_values=beams, num_beams=2, **GREEDY)
    beams.save(tmp_path / "state")
    pairs = text.expand(2, -1)
    for state in (beams, beams.fork(), beams.select([0, 1]), type(beams).load(tmp_path / "state", built)):
        for go_on in (built.read, lambda ids, state: built(input_ids=ids, past_key_values=state)):
            with pytest.raises(StateMismatchError, match="left by beam search"):
                go_on(pairs, state)


def test_beam_search_that_an_error_ends_leaves_beams(model: Any) -> None:
    """Catches rows that a search has put in another order, taken for those that were read: it did not end."""
    state, calls = model.init_state(), []

    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(ids)
        if len(calls) == 2:
            raise RuntimeError("the machine is tired")
        return scores

    with pytest.raises(RuntimeError):
        model.generate(random_ids(1, 12), past_key_values=state, num_beams=2, logits_processor=[fail], **GREEDY)
    assert state.is_left_by_beams


def test_state_whose_input_is_refused_has_its_rows(model: Any) -> None:
    """Catches a reading that a wrong call has turned into one per requested beam."""
    text = random_ids(2, 12)
    state = model.read(text)
    with pytest.raises(StateMismatchError, match="required is at least one token after them"):
        model.generate(text, past_key_values=state, num_beams=3, **GREEDY)
    assert state.batch_size == 2
    assert not state.is_left_by_beams
    assert model.read(text, state).num_tokens_read == 24


def test_token_that_is_not_read_is_known_beside_embeddings(model: Any) -> None:
    """Catches ids in front of what embeddings give that are taken for generated ones."""
    ids = random_ids(1, 5)
    state = model.read(random_ids(1, 40, seed=1))
    embeds = model.get_input_embeddings()(ids).detach()
    output = model.generate(ids, inputs_embeds=embeds, past_key_values=state, do_sample=False, max_new_tokens=6)
    assert state.unread_ids == [int(output[0, -1])]


def test_call_that_fails_leaves_the_rows_as_they_were(model: Any) -> None:
    """Catches a state that an error leaves with a row for every sequence that was requested."""
    state = model.read(random_ids(1, 40))
    options = {"do_sample": True, "num_return_sequences": 3, "repetition_penalty": 0.0}
    with pytest.raises(ValueError, match="penalty"):
        model.generate(random_ids(1, 3), past_key_values=state, max_new_tokens=2, **options)
    assert state.row_lengths == (40,)
    model.generate(random_ids(1, 3), past_key_values=state, do_sample=False, max_new_tokens=2)


def test_assistant_with_a_memory_is_refused_by_name(model: Any) -> None:
    with pytest.raises(TransformerFamError, match="assistant_model has a memory, required is one without"):
        make_tiny_llama().generate(random_ids(1, 9), assistant_model=model, max_new_tokens=9, do_sample=False)


def test_history_is_known_behind_tokens_that_were_taken_back(model: Any) -> None:
    """Catches a whole text that is refused once a draft was not accepted."""
    ids = random_ids(1, 20)
    state = model.init_state()
    state.activate_past_recording()
    model(input_ids=ids, past_key_values=state)
    state.crop(-3)
    assert state.histories == model.read(ids[:, :17]).histories
    assert state.histories != [None]


WIDE = FamConfig(block_size=8, fam_length=2, num_memory_segments=20, fam_key_bias=-1e5)
"""Tokens see all of a text and nothing of the memory, so that a converted model says what its base says."""


@pytest.mark.parametrize("drafts", ["assistant", "prompt lookup", "none"])
@pytest.mark.parametrize("num_read", [0, 8, 13])
def test_draft_that_holds_the_end_ends_there(drafts: str, num_read: int) -> None:
    """Catches the end of a draft that is taken for that of the text."""
    ids, plain = random_ids(1, 19).clamp(min=1), make_tiny_llama()
    end = int(plain.generate(ids, **GREEDY)[0, 26])
    options = GREEDY | {"eos_token_id": [end], "pad_token_id": 0, "max_new_tokens": 20}
    if drafts == "assistant":
        options["assistant_model"] = make_tiny_llama()
    elif drafts == "prompt lookup":
        options["prompt_lookup_num_tokens"] = 4
    expected = plain.generate(ids, **options)
    assert expected.shape[1] < 39
    model: Any = convert(make_tiny_llama(), WIDE)
    state = model.read(ids[:, :num_read]) if num_read else model.init_state()
    assert torch.equal(model.generate(ids, past_key_values=state, **options), expected)
    assert state.num_tokens_read == expected.shape[1] - 1
    assert state.unread_ids == [end]


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}, {"encoder_repetition_penalty": 1.5}], ids=str
)
@pytest.mark.parametrize("left", [0, 4])
def test_penalty_sees_what_the_state_has_read(penalty: dict[str, Any], left: int) -> None:
    """Catches a history that is hidden from what looks at all tokens, with padding in front of a row and without."""
    ids = random_ids(2, 19, seed=2)
    mask = torch.ones_like(ids)
    mask[1, :left] = 0
    given = GREEDY | {"attention_mask": mask, "pad_token_id": 0, **penalty}
    expected = make_tiny_llama().generate(ids, **given)
    assert not torch.equal(expected, make_tiny_llama().generate(ids, **GREEDY, attention_mask=mask, pad_token_id=0))
    model: Any = convert(make_tiny_llama(), WIDE)
    state = model.read(ids[:, :11], attention_mask=mask[:, :11])
    assert torch.equal(model.generate(ids, past_key_values=state, **given), expected)
