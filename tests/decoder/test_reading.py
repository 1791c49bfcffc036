"""Reading from an iterator: any cut of the same ids is the same reading, and what cannot be read is refused in time."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_llama import make_tiny_llama, random_ids

from transformerfam import FamConfig, convert
from transformerfam.errors import ReadInterrupted, StateMismatchError, TransformerFamError
from transformerfam.rivals import RivalConfig, attach

BLOCK_SIZE = 8
SYSTEMS: dict[str, Callable[[Any], Any]] = {
    "fam": lambda model: convert(model, FamConfig(block_size=BLOCK_SIZE, fam_length=3, num_memory_segments=1)),
    "armt": lambda model: attach(model, RivalConfig(system="armt", block_size=BLOCK_SIZE, num_memory_tokens=2)),
}
NEXT = random_ids(2, 3, seed=9)


@pytest.fixture(scope="module", params=SYSTEMS)
def model(request: Any) -> Any:
    return SYSTEMS[request.param](make_tiny_llama())


@torch.no_grad()
def said(model: Any, state: Any) -> torch.Tensor:
    """Return what the model predicts after a state, which stays as it is."""
    logits: torch.Tensor = model(input_ids=NEXT[: state.batch_size], past_key_values=state.fork()).logits
    return logits


def cut(ids: torch.Tensor, sizes: Iterable[int]) -> Iterator[torch.Tensor]:
    done = 0
    for size in sizes:
        yield ids[..., done : done + size]
        done += size
    if done < ids.shape[-1]:
        yield ids[..., done:]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.integers(0, 9), sizes=st.lists(st.integers(1, 20), max_size=12), num_rows=st.sampled_from((1, 2)))
def test_any_cut_of_the_same_ids_gives_the_same_state(model: Any, before: int, sizes: list[int], num_rows: int) -> None:
    """Catches ids that are lost, doubled or read in another order where a piece ends, and a block read in parts.

    To the last bit: what is read at once does not depend on where pieces end.
    """
    ids = random_ids(num_rows, before + max(1, sum(sizes)), seed=3)
    whole, parts = (model.read(ids[:, :before]) if before else None for _ in range(2))
    whole = model.read(ids[:, before:], whole)
    parts = model.read(cut(ids[:, before:], sizes), parts)
    assert parts.row_lengths == whole.row_lengths
    assert parts.histories == whole.histories
    assert torch.equal(said(model, parts), said(model, whole))


def test_pieces_may_be_lists_arrays_or_any_iterable(model: Any) -> None:
    """Catches an item that is read as something else than what it holds, and a sequence that is taken for pieces."""
    ids = random_ids(1, 21, seed=4)

    class Reader:
        def __iter__(self) -> Iterator[Any]:
            yield ids[0, :5].tolist()
            yield ids[:, 5:6].tolist()
            yield ids[0, 6:13].numpy()
            yield ids[:, 13:].int()

    expected = said(model, model.read(ids))
    for pieces in (Reader(), iter(Reader()), ([token] for token in ids[0].tolist()), ids[0].tolist(), ids[0].numpy()):
        assert torch.equal(said(model, model.read(pieces)), expected)


def test_padded_pieces_are_pairs_of_ids_and_mask(model: Any) -> None:
    """Catches padding that is read, or held back together with tokens that follow it."""
    ids, mask = random_ids(2, 30, seed=5), torch.ones(2, 30, dtype=torch.long)
    mask[1, 10:13] = 0
    mask[0, 25:] = 0
    pieces = ((ids[:, at : at + 6], mask[:, at : at + 6]) for at in range(0, 30, 6))
    state, whole = model.read(pieces), model.read(ids, attention_mask=mask)
    assert state.row_lengths == whole.row_lengths == (25, 27)
    torch.testing.assert_close(said(model, state), said(model, whole), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "input is empty"),
        ([0.5, 1.0], "token ids are of type torch.float32"),
        ([3, 61], "token id 61 is out of range"),
        (7, r"token ids have shape \(\)"),
        ("text", "input_ids is not a tensor"),
        ([[1, 2], [3, 4]], "state holds 1 sequences, input has 2"),
        (([1, 2], [1]), "attention_mask has shape"),
        (([1, 2], [1, 2]), "attention_mask has the entry 2"),
    ],
)
def test_wrong_piece_is_refused_behind_the_good_ones(model: Any, wrong: Any, message: str) -> None:
    """Catches good pieces that are lost with a wrong one, or a state that is half moved."""
    good = random_ids(1, 2 * BLOCK_SIZE + 3, seed=6)
    state = model.init_state()
    with pytest.raises(TransformerFamError, match=message):
        model.read(iter([good[:, :BLOCK_SIZE], good[:, BLOCK_SIZE:], wrong, [1, 2]]), state)
    assert torch.equal(said(model, state), said(model, model.read(good)))


def test_iterator_that_fails_leaves_what_it_gave(model: Any) -> None:
    """Catches tokens that were given and held back, and are lost with a connection."""
    good = random_ids(1, BLOCK_SIZE + 3, seed=7)

    def failing() -> Iterator[torch.Tensor]:
        yield good
        raise ConnectionError("the line is dead")

    state = model.init_state()
    with pytest.raises(ConnectionError, match="the line is dead"):
        model.read(failing(), state)
    assert torch.equal(said(model, state), said(model, model.read(good)))


def test_error_in_the_model_reads_nothing_more(model: Any) -> None:
    """Catches pieces that are read after one on which the model failed, into a state that is half moved."""
    layer, calls = model.get_decoder().layers[1], []

    def fail(*_: Any) -> None:
        calls.append(1)
        raise RuntimeError("out of memory")

    hook = layer.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            model.read(random_ids(1, BLOCK_SIZE + 3).split(3, dim=1).__iter__())
    finally:
        hook.remove()
    assert len(calls) == 1


def test_interrupt_says_how_much_of_an_iterator_is_read(model: Any) -> None:
    """Catches a Ctrl-C in an iterator that loses the reading."""
    ids = random_ids(1, 50)

    def interrupted() -> Iterator[torch.Tensor]:
        yield ids[:, :21]
        raise KeyboardInterrupt

    message = r"after 16 tokens; resume with model.read\(an iterator of the ids after them, state\)"
    with pytest.raises(ReadInterrupted, match=message) as caught:
        model.read(interrupted())
    error = caught.value
    state = model.read(ids[:, error.num_tokens_done :], error.state)
    assert torch.equal(said(model, state), said(model, model.read(ids)))


def test_what_is_no_iterator_of_ids_is_refused(model: Any) -> None:
    """Catches keys of a tokenizer's output read as pieces, an empty reading, and a mask that says nothing of pieces."""
    with pytest.raises(TransformerFamError, match="input is empty"):
        model.read(iter([]))
    with pytest.raises(TransformerFamError, match="input_ids is not a tensor"):
        model.read({"input_ids": [1, 2]})
    with pytest.raises(TransformerFamError, match="attention_mask is given with an iterator"):
        model.read(iter([[1, 2]]), attention_mask=torch.ones(1, 2))
    with pytest.raises(StateMismatchError, match="state is a int"):
        model.read(iter([[1, 2]]), 3)


def test_progress_of_an_iterator_has_no_end_and_pieces_do_not_pile_up(model: Any) -> None:
    """Catches an iterator that is read into memory first."""
    taken, behind = [0], []

    def endless() -> Iterator[torch.Tensor]:
        for _ in range(100):
            taken[0] += 5
            yield random_ids(1, 5)

    def note(done: int, total: int | None, state: Any) -> None:
        assert total is None
        assert done == state.num_tokens_read
        behind.append(taken[0] - done)

    model.read(endless(), progress=note)
    assert max(behind) < BLOCK_SIZE
    assert len(behind) == -(-500 // BLOCK_SIZE)


def test_bar_of_an_iterator_is_drawn(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a bar that needs a total."""
    model.read(random_ids(1, 20).split(7, dim=1).__iter__(), progress=True)
    assert "reading: 20.0 tokens" in capsys.readouterr().err
