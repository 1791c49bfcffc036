"""Back-propagation through blocks: how far it reaches, and what it keeps in memory."""

import dataclasses
import gc

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from training_recipes import small_recipe

from transformerfam.config import UPDATE_PRESETS
from transformerfam.errors import NonFiniteLossError
from transformerfam.fam.memory import set_key_bias
from transformerfam.training.data.sequences import SequenceBuilder
from transformerfam.training.setup import build_trainee
from transformerfam.training.step.blocks import find_non_finite, run_batch
from transformerfam.training.step.parts import FamChange, GradientCut, RepeatedUpdates
from transformerfam.training.trainer import Trainer


def batch_of(recipe, num_filler):
    sections = {"schedule": {"curriculum": [{"filler_tokens": [num_filler, num_filler]}]}}
    model, tokenizer = build_trainee(recipe)
    builder = SequenceBuilder(small_recipe(**sections), tokenizer)
    return model, builder.batch(0, 0)


def gradient_of_first_block(fam, checkpoint_blocks=True):
    """Return the gradient of the key's loss by the embeddings of the first block, over 16 blocks and more."""
    model, batch = batch_of(small_recipe(fam=fam), 16 * 16)
    batch.weights_BT[~batch.is_key_BT] = 0.0
    embedded = []

    def note(module, args, output):
        if not embedded:  # recomputed blocks come later
            output.retain_grad()
            embedded.append(output)

    model.get_input_embeddings().register_forward_hook(note)
    state = model.init_state(3)
    run_batch(model, batch, state, checkpoint_blocks=checkpoint_blocks).loss.backward()
    return embedded[0].grad


def test_gradient_reaches_first_block_over_16_blocks_through_fam():
    """A state that is detached between blocks, so that nothing learns to remember."""
    gradient = gradient_of_first_block({}, checkpoint_blocks=False)
    assert gradient.abs().sum() > 0
    assert torch.isfinite(gradient).all()


def test_gradient_stays_in_the_window_without_fam():
    """A test that would pass without any memory: BSWA of two layers and one segment reaches two blocks."""
    gradient = gradient_of_first_block({"fam_length": 0, "num_memory_segments": 1}, checkpoint_blocks=False)
    assert gradient is None or gradient.abs().sum() == 0


@pytest.mark.parametrize("fam", [{}, {"fam_length": 0, "num_memory_segments": 2}])
def test_checkpointing_changes_no_gradient(fam):
    """A block that changes the state that came in, so that computing it again gives something else."""
    gradients = []
    for checkpoint_blocks in (False, True):
        model, batch = batch_of(small_recipe(fam=fam), 60)
        loss = run_batch(model, batch, model.init_state(3), checkpoint_blocks=checkpoint_blocks).loss
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, again[name])


def kept_bytes(num_filler, checkpoint_blocks):
    """Return the bytes of all tensors that a batch keeps until its backward pass, and the state that it began with."""
    model, batch = batch_of(small_recipe(), num_filler)
    state = model.init_state(3)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    gc.collect()
    before = {id(held) for held in gc.get_objects() if issubclass(type(held), torch.Tensor)}
    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = run_batch(model, batch, state, checkpoint_blocks=checkpoint_blocks)
    gc.collect()
    for held in gc.get_objects():  # checkpoints keep their arguments themselves
        if issubclass(type(held), torch.Tensor) and id(held) not in before:
            note(held)
    assert output.loss.requires_grad
    return sum(kept.values()), state


def test_checkpointing_keeps_one_block_and_the_memory_between_blocks():
    """Activations of all blocks, or the keys of blocks that nothing sees any more: memory that grows with the text.

    Between two blocks only the memory may be kept, and the sequences' tokens.
    """
    short, state = kept_bytes(16 * 8, checkpoint_blocks=True)
    long, _ = kept_bytes(16 * 24, checkpoint_blocks=True)
    everything, _ = kept_bytes(16 * 24, checkpoint_blocks=False)
    block_bytes = sum(2 * layer.keys[..., layer.sections.block :, :].nbytes for layer in state.layers)
    memory_bytes = state.num_bytes - block_bytes
    assert memory_bytes < state.num_bytes / 2
    assert long - short <= 16 * (1.2 * memory_bytes + 3 * 16 * 8)
    assert everything > 5 * long


def test_logits_are_made_for_weighed_positions_alone():
    """Logits of a whole sequence, the largest tensor of a step."""
    model, batch = batch_of(small_recipe(), 60)
    sizes = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: sizes.append(output.shape[0]))
    run_batch(model, batch, model.init_state(3))
    assert sum(sizes) == int((batch.weights_BT > 0).sum())


def test_passed_fam_is_that_before_the_question():
    """A FAM that has read the answer, and so is given the key again."""
    model, batch = batch_of(small_recipe(), 60)
    passed = run_batch(model, batch, model.init_state(3), pass_before_question=True).passed_fam_LBFD
    whole = batch.question_start // 16 * 16
    expected = model.read(batch.input_ids_BT[:, :whole]).fams
    torch.testing.assert_close(passed, expected)


def test_passed_fam_is_the_starting_one_where_the_question_stands_in_the_first_block():
    """A chain that breaks off at every question in a first block, or continues as if that block were in the FAM."""
    model, batch = batch_of(small_recipe(), 60)
    started = torch.randn(model.init_state(3).fams.shape)
    for question_start, num_blocks in ((15, 0), (16, 1)):
        asked = dataclasses.replace(batch, question_start=question_start)
        output = run_batch(model, asked, model.init_state(3, fam=started), pass_before_question=True)
        assert output.num_passed_blocks == num_blocks
        assert torch.equal(output.passed_fam_LBFD, started) == (num_blocks == 0)


@pytest.mark.parametrize(("layer", "filler"), [(0, 20), (1, 20)])
def test_layer_that_is_not_finite_is_named(layer, filler):
    """A stop that does not say where to look."""
    model, batch = batch_of(small_recipe(), filler)
    with torch.no_grad():
        model.model.layers[layer].mlp.down_proj.weight[0, 0] = torch.inf
    assert find_non_finite(model, batch, model.init_state(3)) == f"block 0, layer {layer}"


def test_block_that_is_not_finite_is_named():
    """Block 0 named whatever the block."""
    model, batch = batch_of(small_recipe(), 60)
    token = int(batch.input_ids_BT[0, 40])
    first = int((batch.input_ids_BT == token).any(0).nonzero()[0])
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    expected = f"block {first // 16}, layer 0"
    with torch.no_grad():
        state = model.init_state(3, fam=torch.zeros(2, 4, 32))
    assert find_non_finite(model, batch, state) == expected


def test_training_stops_at_a_loss_that_is_not_finite(tmp_path):
    """Weights that are overwritten by NaN."""
    trainer = Trainer(small_recipe(), tmp_path)
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteLossError, match=r"at step 0.*block 0, layer 1.*lower optimizer.lr"):
        trainer.run()


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_change_of_the_fam_is_that_of_rows_that_tell_no_key(checkpoint_blocks):
    """A change that is taken after the bound, counts a first update or a row that gives a key, or has no gradient."""
    model, batch = batch_of(small_recipe(fam={"fam_norm_bound": None}), 40)
    batch.is_told_B[:] = torch.tensor([False, True, False])
    fams_LBFD = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(0))
    is_saved = [True, True, False]
    with torch.no_grad():
        state, changes = model.init_state(3, fam=fams_LBFD, is_saved=is_saved), []
        for start in range(0, batch.question_start // 16 * 16, 16):
            before = state.fams.clone()
            model.read(batch.input_ids_BT[:, start : start + 16], state)
            relative_LBF = (state.fams - before).norm(dim=-1) / before.norm(dim=-1)
            changes += [relative_LBF[:, 0].mean()] + ([relative_LBF[:, 2].mean()] if start else [])
    expected = torch.stack(changes).mean()
    assert len(changes) >= 5

    other, _ = batch_of(small_recipe(fam={"fam_norm_bound": None}), 40)
    plain = run_batch(other, batch, other.init_state(3, fam=fams_LBFD, is_saved=is_saved))
    state = model.init_state(3, fam=fams_LBFD, is_saved=is_saved)
    output = run_batch(
        model, batch, state, [FamChange(0.5)], checkpoint_blocks=checkpoint_blocks, pass_before_question=True
    )
    torch.testing.assert_close(output.fam_change, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.loss, plain.loss + 0.5 * expected, rtol=1e-4, atol=1e-5)
    output.loss.backward()
    plain.loss.backward()
    name, weight = next((n, p) for n, p in model.named_parameters() if "o_proj" in n)
    assert not torch.allclose(weight.grad, dict(other.named_parameters())[name].grad, rtol=1e-3)


def test_change_of_the_fam_is_taken_before_the_bound():
    """A bound that hides how much of the FAM every update replaces."""
    fams_LBFD = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(0))
    fams_LBFD = fams_LBFD / fams_LBFD.pow(2).mean(-1, keepdim=True).sqrt()
    changes = []
    for bound in (1.0, None):
        model, batch = batch_of(small_recipe(fam={"fam_norm_bound": bound, "block_size": 32}), 1)
        assert 32 <= batch.question_start < 64  # one update
        batch = dataclasses.replace(batch, is_told_B=torch.zeros(3, dtype=torch.bool))
        state = model.init_state(3, fam=fams_LBFD, is_saved=[True] * 3)
        changes.append(run_batch(model, batch, state, [FamChange(1.0)]).fam_change)
    torch.testing.assert_close(changes[0], changes[1])
    assert changes[0] > 0


def test_gradient_tokens_cut_keys_and_values_and_leave_the_fam():
    """A shortcut that changes the loss, cuts the way through the FAM, or saves nothing."""
    model, batch = batch_of(small_recipe(), 60)
    assert batch.question_start % 16 < 8  # its tokens keep their gradient
    batch.weights_BT[~batch.is_key_BT] = 0.0
    embedded, losses = [], []

    def note(module, args, output):
        if output.requires_grad:
            output.retain_grad()
            embedded.append(output)

    model.get_input_embeddings().register_forward_hook(note)
    for gradient_tokens in (16, 6):
        embedded.clear()
        state = model.init_state(3)
        output = run_batch(model, batch, state, [GradientCut(gradient_tokens)], checkpoint_blocks=False)
        output.loss.backward()
        losses.append(output.loss.detach())
        tokens = [e for e in embedded if e.shape[0] == 3]
        assert tokens[0].shape[1] == gradient_tokens
        assert tokens[0].grad.abs().sum() > 0  # the first block, through four FAMs and more
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("preset", ["gated", "gated_slots"])
def test_slots_keep_their_gradient_in_front_of_a_question_at_the_end_of_a_block(preset):
    """Slots that tokens see as they were read without gradient, so that nothing is learned from that question."""
    fam = UPDATE_PRESETS[preset] | {"fam_norm_bound": float("inf")}
    length = batch_of(small_recipe(), 60)[1].input_ids_BT.shape[1]
    model, batch = batch_of(small_recipe(fam=fam | {"block_size": length // 2}), 60 + length % 2)
    batch.weights_BT[~batch.is_key_BT] = 0.0
    gradient_tokens = batch.input_ids_BT.shape[1] - batch.question_start
    assert gradient_tokens < length // 2  # the question is in the second of two whole blocks
    embedded, gradients = [], []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: embedded.append(output))
    for tokens in (None, gradient_tokens):
        embedded.clear()
        state = model.init_state(3)
        output = run_batch(model, batch, state, [GradientCut(tokens)] if tokens else [], checkpoint_blocks=False)
        first = next(e for e in embedded if e.requires_grad and e.shape[0] == 3)
        gradients.append(torch.autograd.grad(output.loss, first)[0][:, -gradient_tokens:])
    assert gradients[1].abs().sum() > 0
    similarity = torch.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0)
    assert similarity > 0.5  # less what keys and values of the first block have had to do with others


def test_tokens_without_gradient_are_read_once_where_all_rows_begin_alike():
    """A row that gets another row's keys, or the beginning of a reading that had gone further."""
    model, batch = batch_of(small_recipe(), 60)
    batch.weights_BT[~batch.is_key_BT] = 0.0  # tokens that are read without gradient predict nothing
    shapes = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    ids_BT = batch.input_ids_BT.clone()
    ids_BT[:, :10] = ids_BT[0, :10]
    alike = dataclasses.replace(batch, input_ids_BT=ids_BT)
    losses = []
    for gradient_tokens in (None, 6):
        shapes.clear()
        parts = [GradientCut(gradient_tokens)] if gradient_tokens else []
        output = run_batch(model, alike, model.init_state(3), parts, checkpoint_blocks=False)
        losses.append(output.loss)
    num_blocks = ids_BT.shape[1] // 16
    assert num_blocks > 3
    assert [shape for shape in shapes if shape[-1] == 10] == [(1, 10)] + [(3, 10)] * (num_blocks - 1)
    torch.testing.assert_close(losses[1], losses[0])


def test_repeated_updates_are_those_of_reading_the_blocks_again():
    """A repeated update by a row's own block, by one that gives a key, at another place, or cut off the graph.

    With the memory closed to tokens a block's keys and values do not depend on it, so that both ways are the same."""
    model, batch = batch_of(small_recipe(fam={"block_size": 32}), 1)
    assert 32 <= batch.question_start < 64  # one block in front of the question
    set_key_bias(model, -32.0)
    batch.is_told_B[:] = torch.tensor([False, True, False])
    fams_LBFD = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = run_batch(
        model, batch, model.init_state(3, fam=fams_LBFD), [RepeatedUpdates(2)], pass_before_question=True
    )
    blocks = [batch.input_ids_BT[rows, :32] for rows in ([0, 1, 2], [0, 2, 0], [2, 0, 2])]
    with torch.no_grad():
        state = model.init_state(3, fam=fams_LBFD.detach())
        model.read(torch.cat(blocks, dim=1), state)
    torch.testing.assert_close(output.passed_fam_LBFD, state.fams, rtol=1e-4, atol=1e-5)

    set_key_bias(model, 0.0)
    output = run_batch(model, batch, model.init_state(3, fam=fams_LBFD), [RepeatedUpdates(2)])
    output.loss.backward()
    assert fams_LBFD.grad.abs().sum() > 0


def test_no_update_is_repeated_where_every_row_tells_a_key():
    """A key that overwrites another row's."""
    model, batch = batch_of(small_recipe(fam={"block_size": 32}), 1)
    batch.is_told_B[:] = True
    losses = [run_batch(model, batch, model.init_state(3), [RepeatedUpdates(number)]).loss for number in (0, 3)]
    torch.testing.assert_close(*losses, rtol=0, atol=0)
