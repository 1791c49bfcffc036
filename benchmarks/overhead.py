"""What does the memory cost over BSWA? Time of FAM over time of BSWA, against the ratio of counted operations.

Every preset of the update is measured: `fam_update` of a row is its name.
"""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.harness import Row, alternate, ratios, row, spread
from benchmarks.models import next_block
from transformerfam.config import UPDATE_PRESETS
from transformerfam.tools.costs import ModelShape, block_flops

BLOCK_SIZE, FAM_LENGTH = 1024, 64


@torch.no_grad()
def run(model: str = "smollm2", repeats: int = 15, quick: bool = False) -> Iterator[Row]:
    """Time one block after full memory segments, every update and BSWA in turn, for m = 0 and 3."""
    block_size, fam_length = (64, 4) if quick else (BLOCK_SIZE, FAM_LENGTH)
    for num_segments in (0, 3):
        lengths = {"block_size": block_size, "num_memory_segments": num_segments}
        sides, flops = {}, {}
        systems: dict[str, dict[str, Any]] = {
            name: values | {"fam_length": fam_length} for name, values in UPDATE_PRESETS.items()
        }
        for system, fields in (systems | {"bswa": {"fam_length": 0}}).items():
            reader, sides[system] = next_block(model, **fields | lengths)
            flops[system] = block_flops(ModelShape.of(reader.config), reader.fam_config, caches_queries=True)
        seconds = alternate(sides, repeats)
        for update in systems:
            counted = flops[update] / flops["bswa"]
            measured = ratios(seconds[update], seconds["bswa"])
            yield row(
                "fam_over_bswa",
                model=model,
                fam_update=update,
                **lengths,
                fam_length=fam_length,
                num_tokens=block_size,
                **spread("ratio", measured),
                ratio_counted=counted,
                ratio_median_over_counted=sorted(measured)[len(measured) // 2] / counted,
                **spread("tokens_per_second_fam", [block_size / s for s in seconds[update]]),
                **spread("tokens_per_second_bswa", [block_size / s for s in seconds["bswa"]]),
            )
