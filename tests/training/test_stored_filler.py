"""Stored filler: a batch that is written on it, and what a step makes of it."""

import dataclasses

import pytest
import torch
from training_recipes import small_recipe

from transformerfam.fam.memory import set_block_size, set_key_bias
from transformerfam.training.data.sequences import SequenceBuilder
from transformerfam.training.setup import build_trainee
from transformerfam.training.step.blocks import run_batch
from transformerfam.training.step.packed import run_packed_batch
from transformerfam.training.step.stored_filler import StoredFiller, keep_filler
from transformerfam.training.step.teacher import Lesson, Teaching
from transformerfam.training.trainer import Trainer

STORED = {
    "batch_size": 3,
    "stored_blocks": 4,
    "repeat_updates": [2, 2],
    "block_sizes": [32, 64],
    "curriculum": [{"filler_tokens": [40, 120]}],
}
ASKS_LATER = {"ask_later": 1.0, "rows": "all", "probability": 1.0}


def stored_recipe(**sections):
    schedule = {**STORED, **sections.pop("schedule", {})}
    fam = {"block_size": 32, **sections.pop("fam", {})}
    return small_recipe(schedule=schedule, fam=fam, loss={"num_other_tokens": 4}, **sections)


def written(recipe, step, carried_keys=None, key_bias=0.0):
    """Return model, stored filler, and the batch of a step that is written on it."""
    model, tokenizer = build_trainee(recipe)
    set_key_bias(model, key_bias)
    builder = SequenceBuilder(recipe, tokenizer)
    stored = keep_filler(None, model, builder, step, None)
    set_block_size(model, builder.block_size(step))
    return model, stored, builder.batch(step, 0, carried_keys, stored.ids_NT)


@pytest.mark.parametrize(
    "fam",
    [
        {},
        {"fam_query_position": "current"},
        {"fam_position": "fractional"},
        {"window": 20},
        {"zero_first_residual": False, "fam_norm_bound": None},
        {"fam_init": "prefix", "fam_norm_bound": 0.5},
    ],
)
@pytest.mark.parametrize("step", range(3))
def test_filler_from_the_store_is_as_if_it_were_read(step, fam):
    """Stored keys at another place of the block, of another block, or FAM keys that are those of the block before.

    With the memory closed to tokens, keys and values of filler do not depend on it, so that both ways are the same.
    No row gives a key here, since filler after a key would see it."""
    recipe = stored_recipe(state_passing=ASKS_LATER, schedule={"repeat_updates": [0, 0]}, fam=fam)
    model, stored, batch = written(recipe, step, (12345, 54321, 11111), key_bias=-32.0)
    assert not batch.is_told_B.any()
    fams_LBFD = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(0))
    arguments = {"fam": fams_LBFD, "is_saved": [True, False, True]}
    taught_BT = torch.zeros_like(batch.is_key_BT)
    taught_BT[:, batch.question_start : -1] = True
    lesson = Lesson(torch.randn(2, 3, int(taught_BT[0].sum()) + 1, 32), taught_BT)
    taught = {"teaching": Teaching(lesson, 3.0), "pass_before_question": True}
    output = run_packed_batch(model, batch, model.init_state(3, **arguments), stored, **taught)
    plain = dataclasses.replace(batch, is_read_T=None)
    whole = run_batch(model, plain, model.init_state(3, **arguments), **taught)
    assert batch.num_tokens < plain.num_tokens
    assert output.teacher_loss > 0
    torch.testing.assert_close(output.teacher_loss, whole.teacher_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.loss, whole.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.passed_fam_LBFD, whole.passed_fam_LBFD, rtol=1e-4, atol=1e-5)


def test_repeated_updates_are_those_of_reading_stored_blocks():
    """A repeated update by another block than the drawn one, or none at all."""
    recipe = stored_recipe(state_passing=ASKS_LATER)
    model, stored, batch = written(recipe, 0, (12345, 54321, 11111), key_bias=-32.0)
    size = model.fam_config.block_size
    fams_LBFD = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    arguments = {"stored": stored, "pass_before_question": True}
    output = run_packed_batch(model, batch, model.init_state(3, fam=fams_LBFD), **arguments)
    num_whole = batch.question_start // size
    assert num_whole >= 1
    state = model.init_state(3, fam=fams_LBFD.detach())
    with torch.no_grad():
        model.read(batch.input_ids_BT[:, : num_whole * size], state)
        for repeated in batch.sources[-2:]:
            model.read(stored.ids_NT[[repeated] * 3, :size], state)
    torch.testing.assert_close(output.passed_fam_LBFD, state.fams, rtol=1e-4, atol=1e-5)
    set_key_bias(model, 0.0)
    run_packed_batch(model, batch, model.init_state(3, fam=fams_LBFD), **arguments).loss.backward()
    assert fams_LBFD.grad.abs().sum() > 0


def test_passed_fam_reads_stored_filler_between_steps(tmp_path):
    """Filler between steps that is read token by token, or not at all, or as a first update."""
    recipe = stored_recipe(state_passing={**ASKS_LATER, "between_blocks": [3, 3]}, schedule={"block_sizes": [32]})
    trainer = Trainer(recipe, tmp_path)
    set_key_bias(trainer.model, -32.0)
    trainer.stored = keep_filler(None, trainer.model, trainer.sequences, 0, None)
    fams_LBFD = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(0))
    trainer.passing.update_start(0, 0)
    trainer.passing.keep(0, fams_LBFD, (12345, None, 67890))
    trainer._read_between(step=1)
    state = trainer.model.init_state(3, fam=fams_LBFD)
    with torch.no_grad():
        for source in trainer.sequences.sources(1, "between", 4, 3):
            trainer.model.read(trainer.stored.ids_NT[[source] * 3], state)
    torch.testing.assert_close(trainer.passing.saved.fam_LBFD, state.fams, rtol=1e-4, atol=1e-5)


def test_key_and_question_stand_where_they_would_without_a_store():
    """A key that is overwritten by filler, or a question about another one."""
    recipe = stored_recipe(data={"prefix_tokens": [0, 40]})
    for step in range(4):
        _, _, batch = written(recipe, step)
        _, tokenizer = build_trainee(recipe)
        plain = SequenceBuilder(recipe, tokenizer).batch(step, 0)
        assert batch.keys == plain.keys
        same_BT = batch.input_ids_BT == plain.input_ids_BT
        tail = slice(batch.question_start, None)
        assert same_BT[:, tail].all()
        assert torch.equal(batch.is_key_BT, plain.is_key_BT)
        told = SequenceBuilder(recipe, tokenizer).writer.texts["passkey_sentences"].intro_ids(batch.keys[0])
        ids = batch.input_ids_BT[0].tolist()
        starts = [i for i in range(len(ids)) if ids[i : i + len(told)] == told]
        assert len(starts) == 1
        assert batch.is_read_T[starts[0] : starts[0] + len(told)].all()
        assert not ((batch.weights_BT > 0) & ~batch.is_read_T).any()
        is_other = (batch.weights_BT > 0) & ~batch.is_key_BT
        assert is_other[:, batch.question_start - 4 : batch.question_start].all()
        assert is_other.sum() == 4 * 3


def test_one_block_is_read_anew_every_few_steps():
    """A store that goes stale while the weights move, or that loses a block's neighbours."""
    recipe = stored_recipe(schedule={"steps_per_stored_block": 3})
    model, tokenizer = build_trainee(recipe)
    builder = SequenceBuilder(recipe, tokenizer)
    stored = keep_filler(None, model, builder, 0, None)
    before = stored.keys[0].clone()
    with torch.no_grad():
        model.get_decoder().layers[0].self_attn.k_proj.weight.mul_(2)
    for step, changed in ((4, []), (5, []), (6, [2]), (7, [2]), (9, [2, 3])):
        stored = keep_filler(stored, model, builder, step, None)
        assert [i for i in range(4) if not torch.equal(stored.keys[0][i], before[i])] == changed
    again = StoredFiller.read(model, stored.ids_NT[3:])
    torch.testing.assert_close(again.keys[1][0], stored.keys[1][3])
    torch.testing.assert_close(again.values[1][0], stored.values[1][3])


def test_resumed_run_gives_the_same_losses(tmp_path):
    """A store that is read again, with later weights, when a run resumes."""
    values = {"schedule": {"steps": 8}, "state_passing": {**ASKS_LATER, "ask_later": 0.5}}
    rows, resumed = [], []
    Trainer(stored_recipe(**values), tmp_path / "whole").run(lambda trainer, row: rows.append(row["loss"]))
    Trainer(stored_recipe(schedule={"steps": 5}, state_passing=values["state_passing"]), tmp_path / "parts").run()
    trainer = Trainer(stored_recipe(**values), tmp_path / "parts", resume=True)
    trainer.run(lambda trainer, row: resumed.append(row["loss"]))
    assert resumed == rows[5:]
