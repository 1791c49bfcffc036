"""Plans without weights: parameters that are exact, memory that is near what a real step takes, and the command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny_families import ALL_CASES, is_at_hand, make_tiny
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, JetMoeConfig, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from transformerfam import FamConfig, FamState, convert
from transformerfam.cli.app import app
from transformerfam.config import UPDATE_PRESETS
from transformerfam.errors import TransformerFamError, UnsupportedModelError
from transformerfam.fam.convert import fam_parameters
from transformerfam.tools.costs import ModelShape, block_flops
from transformerfam.tools.plan import PAPER_SHAPES, WALKED_BLOCKS, find_config, find_memory, make_plan
from transformerfam.training.recipe.toml import load_recipe
from transformerfam.weights.models import load_model

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
FAM = FamConfig(block_size=8, fam_length=2, num_memory_segments=1)
PLANNED = ("llama", "mixtral", "gemma3_text", "olmo2", "falcon", "deepseek_v3")
"""Families that the fast tests plan."""
at_hand = [case for case in ALL_CASES if is_at_hand(case)]


@pytest.mark.parametrize(
    "case", [case if case in PLANNED else pytest.param(case, marks=pytest.mark.slow) for case in at_hand]
)
def test_parameters_and_state_are_those_of_the_real_model(case: str) -> None:
    """Catches a family that is planned in another shape than it is built and converted in."""
    config = make_tiny(case).config
    plan = make_plan(case, FAM, context_tokens=32, config=config, training="none")
    model: Any = convert(make_tiny(case), FAM).to(torch.bfloat16)
    as_loaded = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # some parts stay float32
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())
    bytes_memory = sum(parameter.nbytes for parameter in fam_parameters(model))
    assert plan.bytes_weights == sum(parameter.nbytes for parameter in as_loaded.parameters()) + bytes_memory
    assert plan.bytes_state == model.init_state().num_bytes


@pytest.mark.parametrize(("name", "billions"), [("paper-1b", 1.19), ("paper-8b", 8.59), ("paper-24b", 24.5)])
def test_paper_shapes_have_the_named_sizes(name: str, billions: float) -> None:
    config = find_config(name)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    without_embeddings = sum(p.numel() for p in model.parameters()) - config.vocab_size * config.hidden_size
    assert without_embeddings / 1e9 == pytest.approx(billions, rel=0.005)
    assert name in PAPER_SHAPES


@pytest.mark.parametrize("size", ["1b", "8b", "24b"])
def test_recipe_of_a_paper_size_is_valid_and_has_its_settings(size: str) -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / f"paper_{size}.toml")
    assert recipe.instructions is not None
    assert recipe.lora is not None
    assert (recipe.instructions.length, recipe.lora.rank, recipe.schedule.batch_size) == (8500, 64, 128)
    assert recipe.optimizer.lr == (1e-4 if size == "1b" else 3e-3)


@pytest.mark.parametrize("training", ["none", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("preset", UPDATE_PRESETS)
def test_every_update_is_planned_and_counted(preset: str, training: Any) -> None:
    config = make_tiny("llama").config
    fam = FamConfig.preset(preset, block_size=16, fam_length=4, num_memory_segments=2)
    plan = make_plan("x", fam, context_tokens=64, config=config, training=training)
    model: Any = convert(make_tiny("llama"), fam).to(torch.bfloat16)
    assert plan.bytes_state == model.init_state().num_bytes
    counted = block_flops(ModelShape.of(config), fam, caches_queries=True) / 16
    assert plan.flops_per_token_reading == pytest.approx(counted, rel=1e-9)


def test_operations_are_the_counted_ones() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    fam = FamConfig(block_size=16, fam_length=4, num_memory_segments=2)
    plan = make_plan("x", fam, context_tokens=64, config=config, training="none")
    assert plan.flops_per_token_reading == pytest.approx(block_flops(ModelShape.of(config), fam) / 16, rel=1e-9)


MEASURE = """
import gc, json, sys, torch
from pathlib import Path
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformerfam import FamConfig, FamState, convert

def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])

torch.set_num_threads(1)
arguments = json.loads(sys.argv[1])
torch.ones(64, 64) @ torch.ones(64, 64)
before = resident("VmRSS")
fam = FamConfig(**arguments["fam"], fam_key_bias=0.0)
model = convert(LlamaForCausalLM(LlamaConfig(**arguments["shape"])), fam).train()
optimizer = torch.optim.AdamW(model.parameters())
ids = torch.zeros(1, arguments["num_tokens"], dtype=torch.long)

def run(state, part):
    after = state.shallow_copy()
    for layer in after.layers:
        layer.make_room()
    logits = model.get_output_embeddings()(model.get_decoder()(input_ids=part, past_key_values=after).last_hidden_state)
    for layer in after.layers:
        layer.drop_block()
    return cross_entropy(logits[0].float(), part[0]), after

for _ in range(2):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    state, total = model.init_state(), 0
    for part in ids.split(fam.block_size, dim=1):
        loss, state = checkpoint(run, state, part, use_reentrant=False)
        total = total + loss
    total.backward()
    optimizer.step()
    del state, total, loss
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has /proc; there it always runs")
@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [1024, 3072])
def test_training_memory_is_within_a_tenth_of_what_a_process_takes(num_tokens: int) -> None:
    """Catches activations, states, gradients or averages that the plan leaves out or counts twice."""
    shape = {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    }
    fam = {"block_size": 512, "fam_length": 32, "num_memory_segments": 0}
    plan = make_plan(
        "x",
        FamConfig(**fam),
        context_tokens=num_tokens,
        config=LlamaConfig(**shape),
        training="full",
        dtype=torch.float32,
    )
    arguments = json.dumps({"shape": shape, "fam": fam, "num_tokens": num_tokens})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, arguments],
        env={"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0", "PATH": ""},  # what is freed goes back
        capture_output=True,
        text=True,
        check=True,
    )
    assert plan.bytes_training == pytest.approx(int(done.stdout.split()[-1]), rel=0.1)


@pytest.mark.slow
def test_more_devices_share_weights_gradients_and_averages() -> None:
    config = LlamaConfig(
        vocab_size=640, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    options = {"context_tokens": 64, "config": config, "training": "full", "training_tokens": 1e9}
    one, four = (make_plan("x", FAM, **options, gpus=n) for n in (1, 4))
    assert four.bytes_optimizer == one.bytes_optimizer // 4
    assert four.bytes_activations == one.bytes_activations
    assert one.bytes_weights / 4 < four.bytes_weights < one.bytes_weights
    assert one.hours == pytest.approx(4 * (four.hours or 0))


@pytest.mark.slow
def test_longer_texts_cost_their_states_alone() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    plans = [make_plan("x", FAM, context_tokens=n, config=config, training="lora", lora_rank=2) for n in (800, 1600)]
    grown = plans[1].bytes_activations - plans[0].bytes_activations
    assert 0 < grown < 100 * 2 * plans[0].bytes_state
    assert plans[0].bytes_reading == plans[1].bytes_reading


def test_command_says_what_a_model_needs(folder: Path) -> None:
    options = ["--context", "512", "--gpus", "2", "--tokens", "1e6"]
    changes = ["--set", "block_size=64", "--set", "num_memory_segments=0"]
    result = CliRunner().invoke(app, ["plan", str(folder), *options, *changes])
    assert result.exit_code == 0, result.output
    for words in ("parameters", "state", "activations", "hours"):
        assert words in result.output


def test_converted_model_is_planned_with_its_own_memory() -> None:
    """Catches a state of the paper's size for a model that has another."""
    options = ["--train", "none", "--context", "128", "--dtype", "float32", "--json"]
    result = CliRunner().invoke(app, ["plan", "tiny", *options])
    model, _ = load_model("tiny")
    assert json.loads(result.stdout)["bytes_state"] == model.init_state().num_bytes
    assert find_memory("tiny") == model.fam_config
    assert find_memory("paper-1b") == FamConfig()


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(TransformerFamError, match="there is no configuration for 'no-such-model'"):
        find_config("no-such-model")
    with pytest.raises(UnsupportedModelError, match="'jetmoe' has no row in the table of families, which a plan"):
        make_plan(
            "x", FAM, context_tokens=64, config=JetMoeConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=32)
        )
    result = CliRunner().invoke(app, ["plan", "tiny", "--set", "block_sise=64"])
    assert result.exit_code == 2
    assert "did you mean block_size?" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("training", "preset"), [("full", "paper"), ("lora", "gated")])
def test_training_operations_are_those_that_torch_counts(training: Any, preset: str) -> None:
    """Catches what a step does besides the layers: logits made again with their block, LoRA's own matrices."""
    shape = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = LlamaConfig(**shape, num_hidden_layers=3, num_key_value_heads=4)
    size, length, num_blocks = 16, 4, 6
    fam = FamConfig.preset(preset, block_size=size, fam_length=length, num_memory_segments=0, fam_key_bias=0.0)
    plan = make_plan("x", fam, context_tokens=num_blocks * size, config=config, training=training, lora_rank=8)
    model: Any = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # its matrix products are counted on every machine
    if training == "lora":
        inject_adapter_in_model(LoraConfig(r=8, target_modules="all-linear"), model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    model = convert(model, fam).train()
    ids = torch.zeros(1, num_blocks * size, dtype=torch.long)

    def run(before: FamState, part: torch.Tensor) -> tuple[torch.Tensor, FamState]:
        after = before.shallow_copy()
        logits = model(input_ids=part, past_key_values=after).logits
        return cross_entropy(logits[0], part[0]), after

    state, total = model.init_state(), torch.zeros(())
    with FlopCounterMode(display=False) as counter:
        for part in ids.split(size, dim=1):
            loss, state = checkpoint(run, state, part, use_reentrant=False)
            total = total + loss
        total.backward()
    counted = counter.get_total_flops() / ids.numel()
    masked = size * (size - 1) / 2 / size  # eager attention computes what lies after a token too
    masked *= 4 * ModelShape.of(config).flops_per_pair
    assert plan.flops_per_token_training + masked == pytest.approx(counted, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("training", ["full", "lora"])
def test_averages_of_adafactor_are_those_it_keeps(training: Any) -> None:
    """Catches a plan with other settings than a recipe's: a first moment is kept besides sums of rows and columns."""
    config = make_tiny("llama").config
    plan = make_plan("x", FAM, context_tokens=32, config=config, training=training, optimizer="adafactor", lora_rank=4)
    assert plan.trained_parameters * 4 < plan.bytes_optimizer < plan.trained_parameters * 4 * 1.5


@pytest.mark.slow
def test_long_memory_is_planned_without_reading_all_of_it() -> None:
    """Catches a plan that reads as many blocks as the memory has segments, and one that leaves them out."""
    config = LlamaConfig(**SMALL, num_hidden_layers=1)
    some, more, most = (
        make_plan("llama", FAM.replace(num_memory_segments=number), context_tokens=64, config=config, training="full")
        for number in (WALKED_BLOCKS - 2, WALKED_BLOCKS + 2, 10**9)
    )
    block = more.bytes_state / (WALKED_BLOCKS + 2)
    assert 3 * block < more.bytes_reading - some.bytes_reading < 10 * block  # the state, and what is made of it
    assert some.bytes_activations < more.bytes_activations < 1.5 * some.bytes_activations
    assert most.bytes_state == pytest.approx(10**9 * block, rel=0.2)
