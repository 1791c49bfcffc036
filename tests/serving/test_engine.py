"""The engine: answers in one batch that come and go, and texts that are read in slices in between."""

from typing import Any

import pytest
import torch
from tiny_models import make_passkey_model

from transformerfam import FamState
from transformerfam.errors import TransformerFamError
from transformerfam.serving.answers import ListSource
from transformerfam.serving.engine import SMALLEST_SLICE, Engine
from transformerfam.serving.errors import ApiError
from transformerfam.serving.jobs import Generation, Job, Reading
from transformerfam.tasks.ragged import greedy_tokens
from transformerfam.tasks.sampling import Sampler, Sampling


class Ended(list):  # type: ignore[type-arg]
    """What a job said at its end."""

    def of(self, job: Job) -> Job:
        job.on_done = self.append
        return job


@pytest.fixture(scope="module")
def model() -> Any:
    return make_passkey_model(update="gated")[0].eval()


def ids(num_tokens: int, seed: int) -> list[int]:
    return torch.randint(1, 40, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def state_of(model: Any, num_tokens: int, seed: int) -> FamState:
    state: FamState = model.read([ids(num_tokens, seed)])
    return state.compact()


def generation(state: FamState, said: list[int], max_tokens: int = 6, seed: int = 1, **options: Any) -> Generation:
    def take(drawn: Any) -> bool:
        said.append(drawn.token)
        return False

    sampler = Sampler(Sampling())
    return Generation(state, ids(5, seed), sampler, max_tokens, (), **{"on_token": take} | options)


def run(engine: Engine, *ends: Ended) -> None:
    """Take turns until all jobs have ended."""
    for _ in range(1000):
        if all(ends):
            return
        engine.turn()
    raise AssertionError("a job does not end")


def alone(model: Any, state: FamState, max_tokens: int = 6, seed: int = 1) -> list[int]:
    """Return the likeliest tokens after a state and a prompt."""
    return greedy_tokens(model, torch.tensor([ids(5, seed)]), state.fork(), max_tokens)[0].tolist()


def test_answers_that_join_and_leave_at_any_step_are_those_of_each_alone(model: Any) -> None:
    """Catches a row that takes another's place, or loses its own, when one joins or leaves the batch."""
    states = [state_of(model, n, seed=n) for n in (3, 8, 21, 40)]
    lengths = (9, 2, 14, 5)
    required = [alone(model, state, n, seed) for seed, (state, n) in enumerate(zip(states, lengths, strict=True))]
    engine, said = Engine(model, max_batch=3), [[] for _ in states]
    ends = [Ended() for _ in states]
    jobs = []
    for seed, (state, n) in enumerate(zip(states, lengths, strict=True)):
        jobs.append(ends[seed].of(generation(state.fork(), said[seed], n, seed)))
        engine.submit(jobs[-1])
        engine.turn()
        engine.turn()
    run(engine, *ends)
    assert said == required
    assert [job.state.num_tokens_read for job in jobs] == [3 + 4 + 9, 8 + 4 + 2, 21 + 4 + 14, 40 + 4 + 5]
    assert [job.state.unread_ids for job in jobs] == [[row[-1]] for row in required]
    follow = model.read([required[2][-1:] + ids(9, 7)], jobs[2].state)
    again = model.read([ids(21, 21) + ids(5, 2) + required[2] + ids(9, 7)])
    torch.testing.assert_close(follow.fams, again.fams, atol=1e-5, rtol=0)


def test_long_text_delays_an_answer_by_one_slice_at_a_time(model: Any) -> None:
    """Catches a reading that keeps the model until it is through: a novel would stop every chat."""
    seconds = [0.0]
    engine = Engine(model, slice_seconds=0.25, clock=lambda: seconds[0])
    read = model.read

    def slow(ids_1T: Any, state: Any) -> Any:
        seconds[0] += ids_1T.shape[1] / 64  # 16 tokens in 0.25 seconds
        return read(ids_1T, state)

    engine.model = type(
        "Slow", (), {"read": staticmethod(slow), "device": model.device, "__call__": lambda *_, **k: model(**k)}
    )()
    said: list[int] = []
    end, over = Ended(), Ended()
    engine.submit(over.of(Reading(state_of(model, 3, 3), ListSource(ids(400, 1)))))
    engine.submit(end.of(generation(state_of(model, 8, 8), said, max_tokens=20)))
    gaps = []
    while not end:
        before, num_said = seconds[0], len(said)
        engine.turn()
        gaps.append(seconds[0] - before)
        assert len(said) > num_said or num_said == 0
    assert max(gaps) <= 0.25
    assert not over
    run(engine, over)
    assert over == [None]
    assert engine.num_read >= 400


def test_slices_grow_with_the_speed_of_the_machine(model: Any) -> None:
    """Catches slices of one size, too long for a slow machine or too short for a fast one."""
    engine = Engine(model, slice_seconds=0.25)
    state = model.init_state()
    state.config = state.config.replace(block_size=4096)
    lengths = []
    for rate in (64, 64, 4000, 4000, 4000, 4000, 100, 100, 100):
        lengths.append(engine._slice_length(state))
        began = engine.clock() - lengths[-1] / rate
        engine._timed(lengths[-1], began)
    assert lengths[0] == 2 * SMALLEST_SLICE  # nobody waits
    assert max(lengths) > 500
    assert lengths[-1] < max(lengths) / 3


def test_prompt_is_read_between_the_steps_of_others(model: Any) -> None:
    """Catches a long prompt that stops the answers that are under way, and texts that wait for prompts without end."""
    engine = Engine(model)
    said, other = [], []
    ends = [Ended() for _ in range(3)]
    engine.submit(ends[0].of(generation(state_of(model, 3, 3), said, max_tokens=30)))
    engine.turn()
    long = generation(state_of(model, 3, 3), other)
    long.prompt = ids(160, 4)
    engine.submit(ends[1].of(long))
    engine.submit(ends[2].of(Reading(state_of(model, 3, 3), ListSource(ids(80, 1)))))
    for step in range(12):
        engine.turn()
        assert len(said) == step + 2
    assert not other  # the prompt has 20 blocks, each a slice
    run(engine, *ends)
    assert len(other) == 6


def test_answer_that_fails_fails_alone(model: Any) -> None:
    """Catches a memory of numbers that are none, which takes all answers of the batch with it."""
    engine = Engine(model)
    said: list[list[int]] = [[], [], []]
    states = [state_of(model, 9, seed) for seed in range(3)]
    required = [alone(model, state, 12) for state in states]
    for layer in states[1].layers:
        layer.fam.fill_(float("nan"))
    ends = [Ended() for _ in states]
    for state, row, end in zip(states, said, ends, strict=True):
        engine.submit(end.of(generation(state, row, 12)))
    run(engine, *ends)
    assert isinstance(ends[1][0], TransformerFamError)
    assert (ends[0], ends[2]) == ([None], [None])
    assert (said[0], said[2]) == (required[0], required[2])
    assert engine.counts() == {"generating": 0, "open_answers": 0, "open_readings": 0}


def test_error_of_the_whole_batch_is_tried_for_each_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches answers that end because they share a batch with one whose memory cannot be updated."""
    engine = Engine(model)
    said: list[list[int]] = [[], []]
    states = [state_of(model, 5, seed) for seed in range(2)]
    required = [alone(model, state, 8) for state in states]
    plain = engine._logits

    def failing(tokens: list[int], state: FamState) -> torch.Tensor:
        if len(tokens) > 1 or (state.num_tokens_read == 12 and torch.equal(state.fams, bad.state.fams)):
            raise TransformerFamError("the FAM of layer 0 is not finite")
        return plain(tokens, state)

    ends = [Ended(), Ended()]
    jobs = [end.of(generation(s, row, 8)) for s, row, end in zip(states, said, ends, strict=True)]
    bad = jobs[1]
    bad.state.layers[0].fam.add_(1e-3)
    monkeypatch.setattr(engine, "_logits", failing)
    for job in jobs:
        engine.submit(job)
    run(engine, *ends)
    assert ends[0] == [None]
    assert said[0] == required[0]


def test_answer_that_nobody_waits_for_leaves_the_batch(model: Any) -> None:
    """Catches a client that has gone and whose answer is generated to its end."""
    engine = Engine(model)
    said: list[list[int]] = [[], []]
    ends = [Ended(), Ended()]
    jobs = [generation(state_of(model, 5, 5), row, 500) for row in said]
    for job, end in zip(jobs, ends, strict=True):
        engine.submit(end.of(job))
    for _ in range(6):
        engine.turn()
    before = [len(row) for row in said]
    engine.cancel(jobs[0])
    engine.turn()
    assert [type(error) for error in ends[0]] == [ApiError]
    assert [len(row) for row in said] == [before[0], before[1] + 1]
    assert engine.counts()["generating"] == 1


def test_full_queue_says_when_to_come_again(model: Any) -> None:
    """Catches a queue without an end, and one that counts jobs that are done."""
    engine = Engine(model, max_batch=1, max_waiting=1, max_readings=1)
    ends = [Ended(), Ended()]
    for end in ends:
        engine.submit(end.of(generation(state_of(model, 5, 5), [], 2)))
    with pytest.raises(ApiError, match="there are 2 answers being generated, which is the limit") as caught:
        engine.submit(generation(state_of(model, 5, 5), [], 2))
    assert (caught.value.status, caught.value.headers()) == (429, {"Retry-After": "2"})
    engine.submit(Reading(state_of(model, 5, 5), ListSource([])))
    with pytest.raises(ApiError, match="there are 1 texts being read"):
        engine.submit(Reading(state_of(model, 5, 5), ListSource([])))
    run(engine, *ends)
    engine.submit(generation(state_of(model, 5, 5), [], 2))


def test_end_of_the_engine_is_said_to_all_that_wait(model: Any) -> None:
    """Catches requests that hang when the server ends."""
    engine = Engine(model)
    engine.start()
    end = Ended()
    engine.submit(end.of(generation(state_of(model, 5, 5), [], 10**6)))
    engine.stop()
    assert [error.code for error in end] == ["server_ending"]
    with pytest.raises(ApiError, match="the server is ending"):
        engine.submit(generation(state_of(model, 5, 5), [], 2))
