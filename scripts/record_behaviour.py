"""Record what the package computes, and compare a later version with it: for changes that must change no number.

    python scripts/record_behaviour.py before            # some minutes
    python scripts/record_behaviour.py after --against before

Recorded are logits and gradients of small random models with every kind of memory, the first training steps of five
recipes, the rows of a small comparison, and files of states, adapters and models. The second call also loads the files
of the first. Every name that differs is printed with its largest difference; the exit status is then 1.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MixtralConfig, Qwen3Config

from transformerfam import FamConfig, FamState, convert
from transformerfam.rivals import RIVAL_NAMES, RivalConfig, attach, preset

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
FAMILIES = {"llama": LlamaConfig, "gemma2": Gemma2Config, "qwen3": Qwen3Config, "mixtral": MixtralConfig}
BLOCKS = {"block_size": 16, "num_memory_segments": 1}
MEMORIES = {
    "paper": FamConfig(**BLOCKS, fam_length=4),
    "gated": FamConfig.preset("gated", **BLOCKS, fam_length=4),
    "gated_rows": FamConfig.preset("gated_rows", **BLOCKS, fam_length=4),
    "bswa": FamConfig(**BLOCKS, fam_length=0),
    "static_summary": preset("static_summary", FamConfig(**BLOCKS, fam_length=4)),
}
RECIPES = ("tiny_passkey", "tiny_keys", "compare_short_training", "compare_depth_training", "compare_facts_training")
TIMES = ("seconds", "cpu_seconds", "tokens_per_second")
PROVENANCE = ("schema", "version", "git_commit", "machine", "seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="is made")
    parser.add_argument("--against", type=Path, help="what an earlier version recorded")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True)
    record(options.folder)
    if options.against is None:
        return 0
    differences = list(compare(options.against, options.folder))
    print("\n".join(differences) or "equal to the last bit")
    return 1 if differences else 0


def record(folder: Path) -> None:
    """Write everything that is compared into `folder`."""
    numbers: dict[str, torch.Tensor] = {}
    for family in FAMILIES:
        for name, config in MEMORIES.items():
            model = convert(small_model(family), config)
            numbers |= {f"{family} {name} {part}": value for part, value in passed(model).items()}
            if family == "llama":
                model.read(some_ids()).save(folder / f"{name}.fam.safetensors")
    for system in RIVAL_NAMES:
        model = attach(small_model("llama"), RivalConfig(system=system, block_size=16, num_memory_tokens=4))
        numbers |= {f"llama {system} {part}": value for part, value in passed(model).items()}
    save_file(numbers, folder / "numbers.safetensors")
    model = convert(small_model("llama"), MEMORIES["gated"])
    model.save_pretrained(folder / "model")
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(folder / "adapter")
    for recipe in RECIPES:
        settings = [part for key in ("steps=20", "threads=1") for part in ("--set", f"schedule.{key}")]
        run_fam("train", f"recipes/{recipe}.toml", *settings, "--output", str(folder / recipe))
    recipe = Path("recipes/compare_short_training.toml").read_text()
    (folder / "training.toml").write_text(re.sub(r"(?m)^steps = \d+", "steps = 5", recipe))
    comparison = folder / "comparison.toml"
    comparison.write_text(
        'name = "small"\nrecipe = "training.toml"\nsystems = ["fam", "armt"]\nseeds = [0]\n'
        "num_keys = 4\nbatch_size = 4\nfiller_tokens = [64]\n"
    )
    run_fam("compare", str(comparison), "--output", str(folder / "comparison"))


def small_model(family: str) -> Any:
    """Return a random model of `family`, the same every time."""
    torch.manual_seed(0)
    config = FAMILIES[family](**SHAPE)
    return AutoModelForCausalLM.from_config(config).eval()


def some_ids() -> torch.Tensor:
    """Return token ids, shape [2, 57]: three blocks and a part."""
    return torch.randint(SHAPE["vocab_size"], (2, 57), generator=torch.Generator().manual_seed(1))


def passed(model: Any) -> dict[str, torch.Tensor]:
    """Return logits, gradients of every parameter, and what is read token by token after a state."""
    ids = some_ids()
    output = model(ids)
    output.logits.float().log_softmax(-1).gather(-1, ids[..., None]).sum().backward()
    found = {"logits": output.logits.detach()}
    found |= {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.inference_mode():
        state = model.read(ids[:, :40])
        found["later logits"] = model(ids[:, 40:41], past_key_values=state).logits
        found["generated"] = model.generate(ids[:, 40:45], past_key_values=state.fork(), max_new_tokens=8)
    return {name: value.clone().contiguous() for name, value in found.items()}


def run_fam(*arguments: str) -> None:
    """Run the command; what fails ends this script."""
    subprocess.run([sys.executable, "-m", "transformerfam", *arguments], check=True)


def logged(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the training logs and the comparison's rows, without times and places."""
    found = {}
    for path in sorted(folder.rglob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(folder))] = [
            {key: value for key, value in row.items() if key not in TIMES + PROVENANCE} for row in rows
        ]
    return found


def compare(before: Path, after: Path) -> Iterator[str]:
    """Yield one line for every difference, and for every file of `before` that cannot be loaded any more."""
    old, new = (load_file(folder / "numbers.safetensors") for folder in (before, after))
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            yield f"{name}: only in one of them"
        elif old[name].shape != new[name].shape:
            yield f"{name}: of shape {tuple(old[name].shape)}, now {tuple(new[name].shape)}"
        elif not torch.equal(old[name], new[name]):
            yield f"{name}: {(old[name].double() - new[name].double()).abs().max():.1e}"
    old_rows, new_rows = logged(before), logged(after)
    for name in sorted(old_rows.keys() | new_rows.keys()):
        if old_rows.get(name) != new_rows.get(name):
            yield f"{name}: rows differ"
    for name, config in MEMORIES.items():
        model = convert(small_model("llama"), config)
        state = FamState.load(before / f"{name}.fam.safetensors", model)
        ids = some_ids()[:, :1]
        own = model.read(some_ids())
        if not torch.equal(model(ids, past_key_values=state).logits, model(ids, past_key_values=own).logits):
            yield f"{name}.fam.safetensors: loads as something else"
    for path in ("model", "adapter"):
        for file in sorted((before / path).glob("*.safetensors")):
            if file.read_bytes() != (after / path / file.name).read_bytes():
                yield f"{path}/{file.name}: differs"


if __name__ == "__main__":
    sys.exit(main())
