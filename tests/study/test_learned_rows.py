"""Rows that learn: gradients reach them and nothing else, and what they become is an ordinary state."""

import pytest
import torch
from study_models import STUDY_BLOCK, TEXT, make_study_model

from transformerfam.errors import TransformerFamError
from transformerfam.study.rows import LearnedRows
from transformerfam.study.study import frozen
from transformerfam.tasks.text import encode


@pytest.mark.parametrize(
    ("preset", "changes"), [("gated", {"num_memory_segments": 1}), ("paper", {}), ("gated_rows", {})]
)
def test_gradients_reach_every_row_and_no_weight(preset, changes):
    """Catches rows that are read from a copy, and a study that trains the model."""
    model, tokenizer = make_study_model(preset, **changes)
    ids = encode(tokenizer, TEXT)
    reading = model.read(ids[: 2 * STUDY_BLOCK])
    before = {name: tensor.clone() for name, tensor in reading.layers[0].tensors().items()}
    rows = LearnedRows(reading)
    with frozen(model):
        logits = model(input_ids=torch.tensor([ids[:9]] * 2), past_key_values=rows.state(2)).logits
        logits.square().mean().backward()
    assert all(bool(change.grad.abs().sum(-1).all()) for change in rows.parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in reading.layers[0].tensors().items())


@torch.no_grad()
def test_rows_that_did_not_change_are_those_of_the_reading():
    """Catches rows that are rounded, scaled or put into another layer on their way."""
    model, tokenizer = make_study_model(num_memory_segments=1, num_sink_tokens=2)
    ids = encode(tokenizer, TEXT)
    reading = model.read(ids[: 2 * STUDY_BLOCK])
    state = LearnedRows(reading).state()
    assert torch.equal(state.fams, reading.fams)
    question = torch.tensor([ids[:20]])
    expected = model(input_ids=question, past_key_values=reading.fork()).logits
    assert torch.equal(model(input_ids=question, past_key_values=state).logits, expected)
    assert state.num_tokens_read == reading.num_tokens_read + 20


@torch.no_grad()
def test_changed_rows_are_seen_at_their_own_scale():
    """Catches a change that is lost, and one learning rate for columns of very different sizes."""
    model, tokenizer = make_study_model()
    reading = model.read(encode(tokenizer, TEXT)[:STUDY_BLOCK])
    for layer in reading.layers:
        layer.fam[..., :4] *= 100
    rows = LearnedRows(reading)
    rows.put({i: torch.ones_like(change) for i, change in rows.changes.items()})
    moved = rows.state().fams - reading.fams
    for layer_idx, fam in enumerate(reading.fams):
        size = fam[0].square().mean(0).sqrt()
        torch.testing.assert_close(moved[layer_idx, 0, 0, :4], size[:4])
        assert bool((moved[layer_idx] > 0).all())
    small = torch.tensor([[0.0, 3.0], [0.0, -4.0]])
    reading.layers[0].fam = small[None]
    assert LearnedRows(reading, torch.stack([small[None]] * 2)).scale[0][0] > 0


def test_reading_within_a_block_or_of_several_texts_is_refused():
    """Catches tokens of a block that are lost when its rows are replaced."""
    model, tokenizer = make_study_model()
    ids = encode(tokenizer, TEXT)
    with pytest.raises(TransformerFamError, match=r"1 sequences with \[1\] tokens of a block, required is one"):
        LearnedRows(model.read(ids[: STUDY_BLOCK + 1]))
    with pytest.raises(TransformerFamError, match="2 sequences"):
        LearnedRows(model.read(torch.tensor([ids[:STUDY_BLOCK]] * 2)))
