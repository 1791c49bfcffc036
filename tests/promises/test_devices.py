"""The same numbers on a CUDA device as on the CPU: reading, gradients, decoding, training, and what is saved.

What needs a CUDA device is skipped where there is none; errors for a device that is missing are tested everywhere.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import EVERY_CASE, make_tiny
from tiny_llama import make_tiny_llama, random_ids, random_rows
from training_recipes import small_recipe
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from transformerfam import FamConfig, FamState, convert
from transformerfam.cli.app import app
from transformerfam.comparison import load_comparison, run_all
from transformerfam.comparison.report import comparison_tables
from transformerfam.comparison.run import BYTES_LENGTHS, BYTES_TASK, TRAINED_TASK
from transformerfam.comparison.schedule import Schedule
from transformerfam.decoder.kernels import Sight, attend_piece
from transformerfam.errors import TransformerFamError
from transformerfam.fam.compiled import compile_decoding, compile_reading
from transformerfam.reports.rows import read_rows
from transformerfam.rivals import RIVAL_NAMES, RivalConfig, attach
from transformerfam.rivals.state import RivalState
from transformerfam.tools.plan import make_plan
from transformerfam.training.data.instructions import weighed_batch
from transformerfam.training.step.blocks import run_batch
from transformerfam.training.trainer import Trainer
from transformerfam.weights.models import find_device

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here; where there is one, make test runs it"
)

RECIPES = Path(__file__).parents[2] / "recipes" / "comparisons"
CONFIGS = {
    "fam": FamConfig(block_size=6, fam_length=2, num_memory_segments=0, fam_key_bias=0.0),
    "memory segments": FamConfig(block_size=5, fam_length=2, num_memory_segments=2, fam_key_bias=0.0),
    "sinks": FamConfig(block_size=5, fam_length=0, num_memory_segments=1, num_sink_tokens=2),
    "window": FamConfig(block_size=5, fam_length=2, num_memory_segments=1, window=3, num_previous_fams=2),
}


@pytest.mark.parametrize("name", ["meta", "no such device", "mps:7", "cuda:99"])
def test_missing_device_is_refused(name: str) -> None:
    """Catches a device that is taken silently for another, and torch's own trace."""
    with pytest.raises(TransformerFamError, match=f"device '{name}' cannot be used here"):
        find_device(name)


def test_commands_refuse_a_missing_device(tmp_path: Any) -> None:
    """Catches an option that is read and not used."""
    state = str(tmp_path / "state.safetensors")
    runs = ["compare", str(RECIPES / "passkey.toml"), "--output", str(tmp_path)]
    for arguments in (
        ["read", "-", "--save", state],
        ["generate", "Why?", "--state", state],
        runs,
        [*runs, "--run", "fam-0"],
    ):
        result = CliRunner().invoke(app, [*arguments, "--device", "cuda:99"], input="text")
        assert (result.exit_code, type(result.exception)) == (2, SystemExit)
        assert "device 'cuda:99' cannot be used here" in result.stderr


def make_pair(name: str) -> tuple[Any, Any]:
    """Return two models of the same weights, the second on the CUDA device."""
    return convert(make_tiny_llama(), CONFIGS[name]), convert(make_tiny_llama(), CONFIGS[name]).to("cuda")


def read_in_chunks(model: Any, ids: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, FamState]:
    state = model.init_state(len(ids))
    chunks = ids.to(model.device).split(lengths, dim=1)
    return torch.cat([model(input_ids=c, past_key_values=state).logits for c in chunks], dim=1), state


@needs_cuda
@pytest.mark.parametrize("name", CONFIGS)
def test_reading_and_gradients_match(name: str) -> None:
    """Catches a tensor that is made on another device, and a kernel that sees other keys."""
    cpu, cuda = make_pair(name)
    ids = random_ids(2, 33)
    weighting = random_rows(2, 33, cpu.config.vocab_size)
    for lengths in ((33,), (3, 17, 1, 1, 11)):
        (expected, expected_state), (found, state) = (read_in_chunks(model, ids, lengths) for model in (cpu, cuda))
        torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)
        for layer, expected_layer in zip(state.layers, expected_state.layers, strict=True):
            for part, tensor in expected_layer.tensors().items():
                torch.testing.assert_close(layer.tensors()[part].cpu(), tensor, atol=1e-4, rtol=1e-4)
        for logits, model in ((expected, cpu), (found, cuda)):
            model.zero_grad()
            (logits * weighting.to(logits.device)).sum().backward()
        for (parameter_name, wanted), there in zip(cpu.named_parameters(), cuda.parameters(), strict=True):
            if wanted.grad is not None:
                scale = float(wanted.grad.abs().max())
                difference = (there.grad.cpu() - wanted.grad).abs().max()
                assert difference <= 1e-3 * scale, parameter_name


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "num_tokens", "num_before"), [(64, 512, 64), (64, 512, 576), (0, 512, 512)])
def test_kernels_match_a_masked_call(dtype: torch.dtype, num_rows: int, num_tokens: int, num_before: int) -> None:
    """Catches causal attention that is aligned to the upper left, where the keys in front get lost."""
    num_keys = num_before + num_tokens
    sight = Sight(num_rows, num_before - num_rows)
    query = random_rows(1, 8, num_rows + num_tokens, 64, seed=1).to("cuda", dtype)
    key, value = (random_rows(1, 2, num_keys, 64, seed=seed).to("cuda", dtype) for seed in (2, 3))
    found, _ = attend_piece(torch.nn.Module(), query, key, value, sight)
    keys = torch.arange(num_keys)
    mask = torch.cat(
        (
            (keys >= sight.first_row_key).expand(num_rows, -1),
            keys[None] <= torch.arange(num_tokens)[:, None] + num_before,
        )
    )
    logits = query.double() @ key.double().repeat_interleave(4, 1).mT / 8
    weights = logits.masked_fill(~mask.to("cuda"), -torch.inf).softmax(-1)
    expected = (weights @ value.double().repeat_interleave(4, 1)).transpose(1, 2)
    error = (found.double() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@needs_cuda
@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_steps_match(name: str) -> None:
    """Catches a graph that was made for the CPU."""
    plain, compiled = make_pair(name)
    compile_decoding(compiled, batch_size=2)
    compile_reading(compiled, batch_size=2)
    lengths = (23, 1, 1, 1, 1, 1, 1, 1)
    ids = random_ids(2, sum(lengths))
    (expected, _), (found, _) = (read_in_chunks(model, ids, lengths) for model in (plain, compiled))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


@needs_cuda
@torch.no_grad()
def test_generating_and_a_saved_state_match(tmp_path: Any) -> None:
    """Catches a state that can only be loaded where it was made."""
    cpu, cuda = make_pair("memory segments")
    ids = random_ids(1, 40)
    read_on_cuda = cuda.read(ids)
    read_on_cuda.save(tmp_path / "state.safetensors")
    texts = []
    for model, state in (
        (cpu, cpu.read(ids)),
        (cuda, read_on_cuda),
        (cpu, FamState.load(tmp_path / "state.safetensors", cpu)),
        (cuda, FamState.load(tmp_path / "state.safetensors", cuda)),
    ):
        question = random_ids(1, 4, seed=1).to(model.device)
        texts.append(model.generate(question, past_key_values=state, max_new_tokens=12, do_sample=False).tolist())
    assert texts[1:] == texts[:-1]


@needs_cuda
@torch.no_grad()
def test_reading_in_bfloat16_stays_near() -> None:
    """Catches masks, rows or tables of another dtype."""
    cpu, cuda = make_pair("fam")
    cuda.to(torch.bfloat16)
    ids = random_ids(1, 30)
    expected, found = (read_in_chunks(model, ids, (30,))[0] for model in (cpu, cuda))
    assert (found.cpu().float() - expected).norm() / expected.norm() < 0.05


TRAINING = {
    "blocks": {
        "schedule": {"steps": 6},
        "state_passing": {"probability": 0.9, "rows": "all", "ask_later": 0.5, "start_step": 1, "noise": 0.01},
        "loss": {"fam_change": 0.1},
    },
    "repeats": {"schedule": {"steps": 6, "repeat_updates": [1, 2], "gradient_tokens": 40}, "fam": {"block_size": 48}},
    "stored": {
        "schedule": {
            "steps": 6,
            "stored_blocks": 4,
            "repeat_updates": [2, 2],
            "block_sizes": [32, 64],
            "curriculum": [{"filler_tokens": [40, 120]}],
        },
        "fam": {"block_size": 32},
        "loss": {"num_other_tokens": 4},
        "state_passing": {"probability": 1.0, "rows": "all", "ask_later": 0.5, "between_blocks": [0, 2]},
    },
}


@needs_cuda
@pytest.mark.parametrize("name", TRAINING)
def test_training_gives_the_same_losses_and_is_resumed_elsewhere(tmp_path: Any, name: str) -> None:
    """Catches a batch, a passed FAM or stored filler left on another device."""
    recipe = small_recipe(**TRAINING[name])
    Trainer(recipe, tmp_path / "here").run()
    Trainer(recipe, tmp_path / "there", device="cuda").run()
    halves = small_recipe(**{**TRAINING[name], "schedule": {**TRAINING[name]["schedule"], "max_seconds": 0.0}})
    Trainer(halves, tmp_path / "both", device="cuda").run()  # one step
    Trainer(recipe, tmp_path / "both", device="cuda", resume=True).run()
    logs = {}
    for folder in ("here", "there", "both"):
        lines = (tmp_path / folder / "log.jsonl").read_text().splitlines()
        logs[folder] = [[json.loads(line)[key] for key in ("loss", "grad_norm", "key_accuracy")] for line in lines]
    assert len(logs["here"]) == 6
    for folder in ("there", "both"):
        for found, expected in zip(logs[folder], logs["here"], strict=True):
            assert found == pytest.approx(expected, rel=2e-3, abs=1e-4, nan_ok=True)


@needs_cuda
@torch.no_grad()
@pytest.mark.parametrize("case", EVERY_CASE)
def test_every_family_reads_the_same(case: str) -> None:
    """Catches a family's tables, latents or experts left on another device."""
    config = FamConfig(block_size=5, fam_length=2, num_memory_segments=1, fam_key_bias=0.0)
    cpu, cuda = convert(make_tiny(case), config), convert(make_tiny(case).to("cuda"), config)
    ids = random_ids(2, 33)
    for lengths in ((33,), (3, 17, 1, 1, 11)):
        (expected, expected_state), (found, state) = (read_in_chunks(model, ids, lengths) for model in (cpu, cuda))
        assert (found.cpu() - expected).norm() / expected.norm() < 1e-3
        assert (state.fams.cpu() - expected_state.fams).norm() / expected_state.fams.norm() < 1e-3


@needs_cuda
@pytest.mark.parametrize("system", RIVAL_NAMES)
def test_every_rival_reads_the_same(system: str, tmp_path: Path) -> None:
    """Catches a rival's mask, memory, rows or state left on another device."""
    values = {"system": system, "block_size": 8, "num_memory_tokens": 3, "association_width": 16}
    cpu, cuda = (attach(make_tiny_llama(), RivalConfig.from_dict(values)) for _ in range(2))
    cuda.to("cuda")
    ids = random_ids(2, 33)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    weighting = random_rows(2, 33, cpu.config.vocab_size)
    states = []
    for model in (cpu, cuda):
        logits = model(input_ids=ids.to(model.device)).logits
        (logits * weighting.to(model.device)).sum().backward()
        with torch.no_grad():
            states.append(model.read(ids, attention_mask=mask))
    for (name, wanted), there in zip(cpu.named_parameters(), cuda.parameters(), strict=True):
        if wanted.grad is not None:
            assert (there.grad.cpu() - wanted.grad).norm() <= 1e-3 * wanted.grad.norm(), name
    states[1].save(tmp_path / "state.safetensors")
    states.append(RivalState.load(tmp_path / "state.safetensors", cpu))
    with torch.no_grad():
        found = [
            model(input_ids=random_ids(2, 9, seed=1).to(model.device), past_key_values=state).logits.cpu()
            for model, state in zip((cpu, cuda, cpu), states, strict=True)
        ]
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], atol=1e-3, rtol=1e-3)


@needs_cuda
@pytest.mark.parametrize("task", ["passkey", "named-keys", "facts"])
def test_a_comparison_runs_there(tmp_path: Path, task: str) -> None:
    """Catches questions evaluated on another device than the model's, and a training that hides where it ran."""
    name = {"passkey": "depth", "named-keys": "capacity", "facts": "facts"}[task]
    file = RECIPES / f"{name}.toml"
    small = ["filler_tokens=[64]", "num_keys=2", "batch_size=2", "recipe.schedule.steps=3"]
    options = [part for value in small for part in ("--set", value)]
    for run in ("fam-0", "rmt-0"):
        arguments = ["compare", str(file), *options, "--output", str(tmp_path), "--run", run, "--device", "cuda"]
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
        described = [row for row in read_rows([tmp_path / run / "rows.jsonl"]) if row["task"] == TRAINED_TASK]
        assert [row["device"] for row in described] == [torch.cuda.get_device_name()]


def test_every_run_gets_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a device that is checked, and then not handed to the processes of the runs."""
    commands = []
    monkeypatch.setattr(Schedule, "run", lambda self: commands.append(self.command))
    file = RECIPES / "passkey.toml"
    run_all(load_comparison(file), file, tmp_path, tmp_path / "rows.jsonl", device="cuda:1")
    assert commands
    assert all(command[command.index("--device") + 1] == "cuda:1" for command in commands)


def test_times_of_other_devices_are_not_those_of_a_cpu() -> None:
    """Catches a mean over the seconds of a CPU and of a GPU, and a GPU's time that is shown as a CPU's."""
    comparison = load_comparison(RECIPES / "passkey.toml")
    rows = []
    for system, seed, device, number in (("fam", 0, None, 40), ("fam", 1, "GPU", 4), ("rmt", 0, "GPU", 4)):
        common = {"system": system, "seed": seed, "model": comparison.name, "version": "1"}
        common |= {} if device is None else {"device": device}
        trained = {"task": TRAINED_TASK, "num_parameters": 9, "num_tokens": 1000 * number, "cpu_seconds": number}
        rows.append(common | trained)
        for num_tokens in BYTES_LENGTHS:
            carried = {"task": BYTES_TASK, "num_tokens": num_tokens, "bytes_carried": 8, "tokens_per_second": number}
            rows.append(common | carried)
    training, reading = comparison_tables(comparison, rows)[-2:]
    for table, columns, expected in (
        (training, (3, 4), {"fam": ("22,000", "40"), "rmt": ("4,000", "-")}),
        (reading, (1, 2), {"fam": ("40", "8"), "rmt": ("-", "8")}),
    ):
        numbers = zip(*(table.columns[column].cells for column in columns), strict=True)
        by_system = dict(zip(table.columns[0].cells, numbers, strict=True))
        assert {system: by_system[system] for system in expected} == expected


HEADS_OF_16 = {"head_dim": 16, "query_pre_attn_scalar": 16}  # fewer, a device's flex_attention does not take


@needs_cuda
@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "gemma2", "gemma3_text", "gpt_oss"])
def test_flex_attention_reads_the_same(case: str) -> None:
    """Catches masks, soft caps or sinks that `flex_attention` reads otherwise."""
    config = FamConfig(block_size=5, fam_length=2, num_memory_segments=1, fam_key_bias=-1.0)
    plain = convert(make_tiny(case, **HEADS_OF_16).to("cuda"), config)
    flex = convert(make_tiny(case, attn_implementation="flex_attention", **HEADS_OF_16).to("cuda"), config)
    assert flex.config._attn_implementation == "flex_attention"
    ids = random_ids(2, 33)
    (expected, _), (found, _) = (read_in_chunks(model, ids, (23, 1, 9)) for model in (plain, flex))
    assert (found - expected).norm() / expected.norm() < 1e-2


@needs_cuda
@pytest.mark.parametrize("num_tokens", [1024, 3072])
def test_planned_training_memory_is_within_a_tenth_of_the_allocators(num_tokens: int) -> None:
    """Catches a plan that counts what the device's kernels do not take, or leaves out what they do."""
    shape = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    fam = FamConfig(block_size=512, fam_length=32, num_memory_segments=0, fam_key_bias=0.0)
    plan = make_plan("x", fam, context_tokens=num_tokens, config=shape, training="full", dtype=torch.bfloat16)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model: Any = convert(LlamaForCausalLM(shape).to("cuda", torch.bfloat16), fam).train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ids = torch.zeros(1, num_tokens, dtype=torch.long)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        run_batch(model, weighed_batch(ids, torch.ones(1, num_tokens)), model.init_state(1)).loss.backward()
        optimizer.step()
    assert plan.bytes_training == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)
