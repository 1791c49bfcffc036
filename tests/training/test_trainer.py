"""The training loop: resume, interruption, the files that it leaves."""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch
from launched import CONTEXT, SECONDS
from training_recipes import small_recipe, small_values

from transformerfam.errors import CorruptFileError, RecipeError, TransformerFamError
from transformerfam.files import load_tensors
from transformerfam.tasks.passkey import PasskeyText
from transformerfam.tasks.provenance import memory_notes
from transformerfam.training import ranks as ranks_module
from transformerfam.training import trainer as trainer_module
from transformerfam.training.checkpoint import recipe_of_run
from transformerfam.training.recipe.sections import StatePassingSection
from transformerfam.training.recipe.toml import build_recipe
from transformerfam.training.state_passing import StatePassing
from transformerfam.training.step.step import run_step
from transformerfam.training.tiny import build_tiny_tokenizer
from transformerfam.training.trainer import Trainer
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.models import load_model

# Everything that a resumed run could get wrong: passed states, keys queried later, stages, averages, key bias.
SECTIONS = {
    "schedule": {"steps": 10, "checkpoint_seconds": 0.0},
    "state_passing": {"probability": 0.9, "rows": "all", "ask_later": 0.5, "start_step": 2},
    "optimizer": {"average_decay": 0.9, "schedule": "cosine"},
    "key_bias": {"start_value": -4.0, "end_step": 8},
}


def log_of(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def train_and_be_killed(values, folder, threads):
    """Train in a process that is killed when the log has step 6 and the checkpoint the steps before it alone."""

    def kill(trainer, row):
        if row["step"] == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(threads)
    Trainer(build_recipe(values), folder).run(kill)


def without_times(rows):
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_run_killed_and_resumed_gives_the_losses_of_one_that_ran_through(tmp_path):
    """A resumed run that differs: lost moments, passed states, random numbers, or log lines written twice."""
    values = small_values(**SECTIONS)
    threads = torch.get_num_threads()
    process = CONTEXT.Process(target=train_and_be_killed, args=(values, tmp_path / "killed", threads))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == -signal.SIGKILL
    assert len(log_of(tmp_path / "killed")) == 7
    recipe = build_recipe(values)
    resumed = Trainer(recipe, tmp_path / "killed", resume=True)
    assert resumed.step == 6
    resumed.run()
    Trainer(recipe, tmp_path / "whole").run()
    assert without_times(log_of(tmp_path / "killed")) == without_times(log_of(tmp_path / "whole"))
    rows = log_of(tmp_path / "whole")
    assert [row["step"] for row in rows] == list(range(10))
    assert any(row["state_passed"] for row in rows)
    for name in ("model.safetensors", "fam.safetensors"):
        assert (tmp_path / "killed" / name).stat().st_size == (tmp_path / "whole" / name).stat().st_size


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_run_that_is_ended_keeps_a_checkpoint_and_says_how_to_go_on(tmp_path, number):
    """Minutes of training lost by one key, or by the SIGTERM of a machine that is wanted back."""
    trainer = Trainer(small_recipe(), tmp_path)
    before = signal.getsignal(number)
    result = trainer.run(lambda trainer, row: signal.raise_signal(number) if row["step"] == 2 else None)
    assert (result.steps, result.is_complete) == (3, False)
    assert "--resume" in result.message
    assert signal.getsignal(number) is before
    again = Trainer(small_recipe(), tmp_path, resume=True)
    assert again.run().is_complete
    assert [row["step"] for row in log_of(tmp_path)] == list(range(6))


def test_key_bias_is_exactly_zero_in_the_trained_memory(tmp_path):
    """A bias that is left unfinished when time is up."""
    recipe = small_recipe(key_bias={"start_value": -4.0, "end_step": 6}, schedule={"max_seconds": 0.0})
    trainer = Trainer(recipe, tmp_path)
    assert trainer.run().steps == 1
    assert log_of(tmp_path)[0]["fam_key_bias"] == -4.0
    assert trainer.model.fam_config.fam_key_bias == 0.0
    _, metadata = load_tensors(tmp_path / "fam.safetensors", "adapter", 1)
    assert metadata["fam_config"]["fam_key_bias"] == 0.0


def test_prompt_begins_as_the_last_tokens_of_a_text(tmp_path):
    """Rows in another order, of the text's beginning, or a text that is too short and is repeated silently."""
    text = "The grass is green. The sky is blue."
    trainer = Trainer(small_recipe(model={"prompt_text": text}), tmp_path)
    ids = trainer.tokenizer(text)["input_ids"][-4:]
    model = trainer.model
    assert torch.equal(model.get_decoder().fam.prompt, model.get_input_embeddings().weight[ids])
    with pytest.raises(TransformerFamError, match=r"the text has 1 tokens, required are at least fam_length \(4\)"):
        Trainer(small_recipe(model={"prompt_text": "The"}), tmp_path)


def test_trained_model_is_loaded_as_it_was(tmp_path):
    """A folder that returns the weights from before training, or without their average."""
    trainer = Trainer(small_recipe(optimizer={"average_decay": 0.5}), tmp_path)
    trainer.run()
    model, tokenizer = load_model(tmp_path)
    ids = torch.tensor([tokenizer("The grass is green. The sky is blue. Here we go.")["input_ids"] * 3])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
    assert recipe_of_run(tmp_path) == trainer.recipe


def test_notes_name_every_device_that_steps_were_taken_on(tmp_path, monkeypatch):
    """A run that continued elsewhere, or was only loaded there, and passes for one of that device alone."""
    Trainer(small_recipe(schedule={"steps": 3, "max_seconds": 0.0}), tmp_path).run()  # one step
    for name in ("other", "third"):  # all that are left, then none
        monkeypatch.setattr(trainer_module, "device_name", lambda device, name=name: name)
        Trainer(small_recipe(schedule={"steps": 3}), tmp_path, resume=True).run()
        assert memory_notes(tmp_path)["device"] == "cpu, other"


def test_lora_is_kept_as_an_adapter_in_float16(tmp_path):
    """A LoRA run that writes, or trains, the whole model."""
    trainer = Trainer(small_recipe(lora={"rank": 2}, model={"base": "tiny-random"}), tmp_path)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.endswith("fam.prompt") for name in trained)
    assert any(name.endswith("fam.prompt") for name in trained)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.run()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained
    tensors, metadata = load_tensors(tmp_path / "fam.safetensors", "adapter", 1)
    assert tensors["prompt"].dtype == torch.float16
    assert metadata["notes"]["max_training_filler_tokens"] == 60
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_memory_is_kept_with_the_reading_section(tmp_path, lora):
    """A memory that is read as it was trained though its recipe says otherwise."""
    sections = {"lora": lora} if lora else {}
    reading = {"num_memory_segments": 2, "fam_norm_bound": math.inf}
    trainer = Trainer(small_recipe(reading=reading, **sections), tmp_path)
    assert trainer.model.fam_config.num_memory_segments == 0
    assert trainer.model.fam_config.fam_norm_bound is not None
    trainer.run()
    expected = trainer.recipe.fam.replace(num_memory_segments=2, fam_norm_bound=None)
    if lora is None:
        assert load_model(tmp_path)[0].fam_config == expected
    assert FamAdapter.from_pretrained(tmp_path).config == expected


def test_training_starts_from_a_trained_memory(tmp_path):
    """A second run that begins from scratch, loses the LoRA or prompt of the first, or trains other weights."""
    whole, first, second = tmp_path / "whole", tmp_path / "first", tmp_path / "second"
    Trainer(small_recipe(), whole).run()
    started = Trainer(small_recipe(model={"base": "tiny-random", "memory": str(whole)}), second)
    trained = load_model(whole)[0].state_dict()
    for name, value in started.model.state_dict().items():
        torch.testing.assert_close(value, trained[name], msg=name)
    assert all(p.requires_grad for p in started.model.parameters())

    trainer = Trainer(small_recipe(lora={"rank": 2}, model={"base": str(whole)}), first)
    trainer.run()
    warm = {"base": str(whole), "memory": str(first)}
    started = Trainer(small_recipe(lora={"rank": 2}, model=warm), tmp_path / "third")
    expected = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    found = {name: p for name, p in started.model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-3, rtol=1e-3, msg=name)  # kept in float16
    assert any("lora_B" in name and bool(value.any()) for name, value in found.items())


def test_prompt_of_a_memory_goes_on_as_a_prefix(tmp_path):
    """A prefix that reads otherwise than the prompt that it came from, is not trained, or is lost on the way back."""
    Trainer(small_recipe(), tmp_path / "first").run()
    model = {"base": "tiny-random", "memory": str(tmp_path / "first")}
    trainer = Trainer(small_recipe(model=model, fam={"fam_init": "prefix"}), tmp_path / "second")
    before, tokenizer = load_model(tmp_path / "first")
    ids = torch.randint(len(tokenizer), (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(trainer.model(ids).logits, before(ids).logits, atol=2e-4, rtol=1e-4)
    started = trainer.model.get_decoder().fam.prefix.detach().clone()
    trainer.run()
    after = load_model(tmp_path / "second")[0]
    assert after.fam_config.fam_init == "prefix"
    torch.testing.assert_close(after.get_decoder().fam.prefix, trainer.model.get_decoder().fam.prefix)
    assert bool((after.get_decoder().fam.prefix - started).abs().amax((1, 2)).min() > 0)

    model = {"base": "tiny-random", "memory": str(tmp_path / "second")}
    with pytest.raises(RecipeError, match="has a prefix, fam.fam_init is 'prompt'"):
        Trainer(small_recipe(model=model), tmp_path / "third")


@pytest.mark.parametrize(
    "lora", [{"rank": 4}, *(pytest.param(lora, marks=pytest.mark.slow) for lora in ({"rank": 2, "alpha": 8.0}, None))]
)
def test_memory_with_other_lora_is_refused(tmp_path, lora):
    """LoRA of the first run read into other shapes or scaled again, or left under full training."""
    whole, first = tmp_path / "whole", tmp_path / "first"
    Trainer(small_recipe(), whole).run()
    Trainer(small_recipe(lora={"rank": 2}, model={"base": str(whole)}), first).run()
    sections = {"model": {"base": str(whole), "memory": str(first)}} | ({} if lora is None else {"lora": lora})
    with pytest.raises(RecipeError, match=r"has LoRA of rank, alpha and targets \(2, 32.0"):
        Trainer(small_recipe(**sections), tmp_path / "second")


def test_lora_of_rows_alone_is_trained_and_stays_with_them(tmp_path):
    """LoRA of FAM rows that a later run, or a reading, puts on tokens, or the reverse."""
    whole, first = tmp_path / "whole", tmp_path / "first"
    Trainer(small_recipe(schedule={"steps": 1}), whole).run()
    sections = {"lora": {"rank": 2}, "model": {"base": str(whole)}, "schedule": {"steps": 2}}
    assert Trainer(small_recipe(fam={"fam_lora": "rows"}, **sections), first).run().is_complete
    model, _ = load_model(first)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    with pytest.raises(TransformerFamError, match="fam_lora is 'all', and the LoRA in .* was trained with 'rows'"):
        load_model(first, config_overrides={"fam_lora": "all"})
    sections["model"]["memory"] = str(first)
    with pytest.raises(TransformerFamError, match="leave fam_lora as it was trained"):
        Trainer(small_recipe(**sections), tmp_path / "second")
    assert Trainer(small_recipe(fam={"fam_lora": "rows"}, **sections), tmp_path / "third").run().is_complete


def test_memory_of_another_base_is_refused(tmp_path):
    """A memory that is trained on, and noted, with a base that it does not belong to."""
    Trainer(small_recipe(schedule={"steps": 1}), tmp_path / "first").run()
    model = {"base": "smollm2", "memory": str(tmp_path / "first")}
    with pytest.raises(RecipeError, match="belongs to base 'tiny-random', model.base is 'smollm2'"):
        Trainer(small_recipe(model=model), tmp_path / "second")


def test_folder_without_a_memory_is_refused(tmp_path):
    """A path that was mistyped, called a memory of another base model."""
    with pytest.raises(RecipeError, match=r"there is no memory in '.*nowhere'"):
        Trainer(small_recipe(model={"memory": str(tmp_path / "nowhere")}), tmp_path / "second")


def test_memory_notes_what_it_was_started_from(tmp_path):
    """A trained memory that hides the longer filler of an earlier run, or that run itself."""
    first = {"steps": 1, "curriculum": [{"filler_tokens": [10, 60]}]}
    Trainer(small_recipe(schedule=first), tmp_path / "first").run()
    second = {"steps": 1, "curriculum": [{"filler_tokens": [1, 20]}]}
    model = {"base": "tiny-random", "memory": str(tmp_path / "first")}
    Trainer(small_recipe(schedule=second, model=model), tmp_path / "second").run()
    notes = memory_notes(tmp_path / "second")
    assert notes["max_training_filler_tokens"] == 60
    assert notes["started_from"] == memory_notes(tmp_path / "first")


def test_loss_falls_on_a_short_passkey(tmp_path):
    """A trainer that runs, logs, and learns nothing."""
    schedule = {"steps": 60, "batch_size": 8, "curriculum": [{"filler_tokens": [1, 8]}]}
    recipe = small_recipe(schedule=schedule, optimizer={"lr": 5e-3}, fam={"block_size": 64})
    Trainer(recipe, tmp_path).run()
    losses = [row["loss"] for row in log_of(tmp_path)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_folder_of_another_run_is_refused(tmp_path):
    """A finished run overwritten by a second start, or resumed with other settings."""
    Trainer(small_recipe(schedule={"steps": 1}), tmp_path).run()
    with pytest.raises(RecipeError, match="holds a run already"):
        Trainer(small_recipe(), tmp_path)
    with pytest.raises(RecipeError, match="section optimizer differs"):
        Trainer(small_recipe(optimizer={"lr": 1.0}), tmp_path, resume=True)
    assert Trainer(small_recipe(), tmp_path, resume=True).run().steps == 6  # a longer schedule continues


def test_damaged_checkpoint_is_refused(tmp_path):
    """A run that starts over, or with half of its moments, after a disk error."""
    with pytest.raises(CorruptFileError, match="does not exist"):
        Trainer(small_recipe(), tmp_path / "new", resume=True)
    Trainer(small_recipe(schedule={"steps": 1}), tmp_path).run()
    path = tmp_path / "checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match="damaged"):
        Trainer(small_recipe(), tmp_path, resume=True)


def test_key_that_was_lost_is_not_asked_again(tmp_path):
    """Rows that query what the memory cannot hold any more: noise that undoes what was learnt."""
    passing = {"probability": 1.0, "rows": "all", "ask_later": 1.0}
    Trainer(small_recipe(state_passing=passing), tmp_path).run()  # untrained, so that every answer is wrong
    rows = log_of(tmp_path)
    assert any(row["state_passed"] for row in rows)
    assert all(row["key_accuracy"] == 0 and row["key_accuracy_asked_later"] is None for row in rows)


@pytest.mark.parametrize(("num_passed_blocks", "is_held"), [(0, False), (1, False), (10, True)])
def test_key_that_the_passed_fam_never_read_is_not_asked(tmp_path, monkeypatch, num_passed_blocks, is_held):
    """Rows that query a key given after the FAM was taken, or in part: a question that has no answer."""

    def run_and_be_right(*arguments, **options):
        output = run_step(*arguments, **options)
        right = torch.ones_like(output.is_right_B)
        return dataclasses.replace(output, is_right_B=right, num_passed_blocks=num_passed_blocks)

    monkeypatch.setattr(ranks_module, "run_step", run_and_be_right)
    passing = {"probability": 1.0, "rows": "all", "ask_later": 1.0, "before_question": True}
    trainer = Trainer(small_recipe(schedule={"steps": 1}, state_passing=passing), tmp_path)
    trainer.run()
    num_told = len(PasskeyText(build_tiny_tokenizer()).intro_ids(12345))
    assert trainer.sequences.batch(0, 0).num_told_B.tolist() == [num_told] * 3
    assert 1 * 16 < num_told <= 10 * 16
    assert [key is not None for key in trainer.passing.saved.keys] == [is_held] * 3


def test_told_rows_of_a_passed_step_overwrite_as_often_as_asked():
    """Catches fresh sequences that are made to overwrite an old key although the recipe starts them afresh."""
    is_told = torch.tensor([True, False, True, True])
    for share, expected in ((0.0, [False, True, False, False]), (1.0, [True] * 4)):
        passing = StatePassing(StatePassingSection(probability=1.0, overwrite=share), seed=0)
        assert passing.rows_from_saved(3, is_told) == expected


def test_passed_fam_reads_on_between_steps(tmp_path):
    """Catches filler between steps that is not read, is read with gradients, or is read before passing begins."""
    passing = {"probability": 1.0, "rows": "all", "between_blocks": [2, 2], "start_step": 2}
    trainer = Trainer(small_recipe(state_passing=passing), tmp_path)
    fam = trainer.model.init_state(3).fams.detach()
    trainer.passing.keep(0, fam, (12345, None, 67890))
    trainer._read_between(step=1)
    assert torch.equal(trainer.passing.saved.fam_LBFD, fam)
    trainer.passing.started = True
    trainer._read_between(step=5)
    read = trainer.passing.saved
    expected = trainer.model.read(trainer.sequences.filler(5, 32), trainer.model.init_state(3, fam=fam)).fams
    assert torch.equal(read.fam_LBFD, expected)
    assert read.keys == (12345, None, 67890)
    assert not read.fam_LBFD.requires_grad


def test_blocks_between_steps_grow_to_their_most():
    """Catches filler that is as long at the beginning as at the end, or never becomes as long as requested."""
    passing = StatePassing(StatePassingSection(probability=1.0, between_blocks=(1, 21), between_steps=100), seed=0)
    assert passing.blocks_between(50) == 0
    passing.started = True
    drawn = [passing.blocks_between(step) for step in range(400)]
    assert min(drawn) == 1
    assert max(drawn[:10]) <= 3
    assert max(drawn[40:50]) <= 11
    assert max(drawn[100:]) == 21


def test_steps_read_in_the_blocks_they_draw_and_the_memory_is_kept_with_the_recipes(tmp_path):
    """A drawn block that changes the text alone, or the last one drawn that is kept as the memory's."""
    schedule = {"steps": 8, "block_sizes": [16, 32], "curriculum": [{"filler_tokens": [1, 30]}]}
    trainer = Trainer(small_recipe(schedule=schedule), tmp_path)
    rows = []
    trainer.run(lambda trainer, row: rows.append((row["block_size"], trainer.model.fam_config.block_size)))
    assert {size for size, _ in rows} == {16, 32}
    assert all(size == read for size, read in rows)
    adapter = FamAdapter.from_pretrained(tmp_path)
    assert adapter.config.block_size == 16
    assert adapter.notes["max_training_filler_tokens"] == 46


@pytest.mark.parametrize("error", [ConnectionError("the server is gone"), KeyboardInterrupt()])
def test_step_is_kept_whatever_its_callback_raises(tmp_path, error):
    """A tracker whose connection is lost, and with it all that was trained since the last checkpoint."""

    def fail(trainer, row):
        if row["step"] == 2:
            raise error

    Trainer(small_recipe(), tmp_path / "whole").run()
    with pytest.raises(type(error)):
        Trainer(small_recipe(), tmp_path / "run").run(fail)
    resumed = Trainer(small_recipe(), tmp_path / "run", resume=True)
    assert resumed.step == 3
    assert resumed.run().is_complete
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "run")]
    assert [json.loads(line)["loss"] for line in logs[0]] == [json.loads(line)["loss"] for line in logs[1]]


def test_trainer_that_ran_does_not_run_again(tmp_path):
    """Two trainers that write one folder, since the first let it go."""
    trainer = Trainer(small_recipe(), tmp_path)
    assert not trainer.run(lambda trainer, row: True).is_complete
    with pytest.raises(RecipeError, match="ran before; build another with resume=True"):
        trainer.run()
    assert Trainer(small_recipe(), tmp_path, resume=True).run().is_complete


def test_finished_memory_stays_until_the_next_run_begins(tmp_path):
    """A memory that --overwrite deletes before it turns out that nothing can be trained, or a folder left locked."""
    Trainer(small_recipe(), tmp_path).run()
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TransformerFamError, match=r"typo\.txt"):
        Trainer(small_recipe(data={"facts": [1, 1], "fact_filler": "typo.txt"}), tmp_path, overwrite=True)
    Trainer(small_recipe(), tmp_path, overwrite=True)  # built, and never run
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files

    for name in ("checkpoint.safetensors", "fam.safetensors"):
        (tmp_path / name).unlink()  # as a run leaves it that is killed before its first checkpoint
    with pytest.raises(TransformerFamError, match=r"config\.json, which is of no run .* start over by --overwrite"):
        Trainer(small_recipe(), tmp_path)
    assert Trainer(small_recipe(), tmp_path, overwrite=True).run().is_complete
