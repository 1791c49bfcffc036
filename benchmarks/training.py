"""What does training on long texts take? Tokens per second and memory, against transformers' Trainer.

Both train all weights with AdamW on one sequence per step: FAM through all its blocks with a checkpoint per block, the
Trainer with full attention and a checkpoint per layer.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.harness import Row, alternate, in_fresh_process, peak_bytes_of, predicted_excess, ratios, row, spread
from benchmarks.models import base_model, converted, random_tokens
from benchmarks.placement import PLACEMENT
from benchmarks.prefill import REPEATED_TO
from transformerfam.tools.costs import ModelShape, block_flops, full_attention_flops, training_flops
from transformerfam.training.data.instructions import weighed_batch
from transformerfam.training.step.blocks import run_batch

BLOCK_SIZE, FAM_LENGTH = 1024, 64
LENGTHS = (2048, 8192, 32768)
SYSTEMS = ("fam", "full")


def fam_steps(model: str, num_tokens: int) -> Callable[[], Any]:
    """Return what trains FAM for one step."""
    reader = converted(model, is_shared=False, block_size=BLOCK_SIZE, fam_length=FAM_LENGTH, num_memory_segments=0)
    reader.train()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-6)
    ids_BT = random_tokens(model, num_tokens)
    batch = weighed_batch(ids_BT, torch.ones(ids_BT.shape))

    def step() -> None:
        run_batch(reader, batch, reader.init_state()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def full_steps(model: str, num_tokens: int) -> Callable[[], Any]:
    """Return what lets transformers' Trainer do one step."""
    from transformers import Trainer, TrainingArguments

    ids = random_tokens(model, num_tokens)[0].cpu()
    folder = tempfile.mkdtemp()
    trained = copy.deepcopy(base_model(model))

    def step() -> None:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=1,
            learning_rate=1e-6,
            gradient_checkpointing=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=PLACEMENT.is_cpu,
            disable_tqdm=True,
        )
        Trainer(model=trained, args=arguments, train_dataset=[{"input_ids": ids, "labels": ids}]).train()

    return step


BUILDERS = {"fam": fam_steps, "full": full_steps}


def measure_memory(system: str, model: str, num_tokens: int) -> int:
    """Return the bytes by which resident memory rises in two steps, the first of which makes AdamW's averages."""
    step = BUILDERS[system](model, num_tokens)
    return peak_bytes_of(lambda: (step(), step()))


def step_flops(system: str, shape: ModelShape, config: Any, num_tokens: int) -> float:
    """Return the operations of one step."""
    if system == "full":
        one_pass: float = full_attention_flops(shape, num_tokens)
    else:
        one_pass = num_tokens / BLOCK_SIZE * block_flops(shape, config)
    return training_flops(one_pass, 0, num_tokens * shape.flops_per_logits, keeps_logits=system == "full")


def why_skipped(system: str, shape: ModelShape, config: Any, num_tokens: int, speed: float) -> str | None:
    """Return why a cell would take too long or too much memory, or None."""
    flops = step_flops(system, shape, config, num_tokens)
    rows = num_tokens if system == "full" else BLOCK_SIZE
    logits = 3 * 4 * rows * shape.vocab_size  # logits, their float32 copy and their gradient
    kept = PLACEMENT.dtype.itemsize * num_tokens * shape.num_layers * shape.hidden_size if system == "full" else 0
    return predicted_excess(logits + kept, flops / speed)


def run(
    model: str = "smollm2", repeats: int = 5, quick: bool = False, lengths: Sequence[int] = LENGTHS
) -> Iterator[Row]:
    """Train at growing lengths, both systems in turn; one step each where it is long."""
    reader = converted(model, block_size=BLOCK_SIZE, fam_length=FAM_LENGTH, num_memory_segments=0)
    shape, config = ModelShape.of(reader.config), reader.fam_config
    speeds: dict[str, float] = {}
    for num_tokens in lengths[:1] if quick else lengths:
        sides = {}
        for system in SYSTEMS:
            reason = why_skipped(
                system, shape, config, num_tokens, speeds.get(system, PLACEMENT.expected_flops_per_second)
            )
            if reason is None:
                sides[system] = BUILDERS[system](model, num_tokens)
            else:
                yield row("training", system=system, model=model, num_tokens=num_tokens, skipped=reason)
        is_repeated = num_tokens <= REPEATED_TO and not quick
        seconds = alternate(sides, repeats if is_repeated else 1, warm_ups=int(is_repeated))
        for system, times in seconds.items():
            speeds[system] = step_flops(system, shape, config, num_tokens) / min(times)
            yield row(
                "training",
                system=system,
                model=model,
                num_tokens=num_tokens,
                block_size=BLOCK_SIZE,
                fam_length=FAM_LENGTH if system == "fam" else 0,
                num_memory_segments=0,
                **spread("tokens_per_second", [num_tokens / s for s in times]),
                **spread("ratio", ratios(times, seconds["fam"])),
                bytes_peak=in_fresh_process(measure_memory, system, model, num_tokens),
            )
