"""What does the memory cost over BSWA? Time of FAM over time of BSWA, beside the ratio of counted operations."""

from collections.abc import Iterator

import torch

from benchmarks.harness import Row, alternate, ratios, row, spread
from benchmarks.models import next_block
from transformerfam.costs import ModelShape, block_flops

BLOCK_SIZE, FAM_LENGTH = 1024, 64


@torch.no_grad()
def run(model: str = "smollm2", repeats: int = 15, quick: bool = False) -> Iterator[Row]:
    """Time one block behind full memory segments, FAM and BSWA in turn, for m = 0 and 3."""
    block_size, fam_length = (64, 4) if quick else (BLOCK_SIZE, FAM_LENGTH)
    for num_segments in (0, 3):
        lengths = {"block_size": block_size, "num_memory_segments": num_segments}
        sides, flops = {}, {}
        for system, length in (("fam", fam_length), ("bswa", 0)):
            reader, sides[system] = next_block(model, fam_length=length, **lengths)
            flops[system] = block_flops(ModelShape.of(reader.config), reader.fam_config)
        seconds = alternate(sides, repeats)
        counted = flops["fam"] / flops["bswa"]
        measured = ratios(seconds["fam"], seconds["bswa"])
        yield row(
            "fam_over_bswa",
            model=model,
            **lengths,
            fam_length=fam_length,
            num_tokens=block_size,
            **spread("ratio", measured),
            ratio_counted=counted,
            ratio_median_over_counted=sorted(measured)[len(measured) // 2] / counted,
            **spread("tokens_per_second_fam", [block_size / s for s in seconds["fam"]]),
            **spread("tokens_per_second_bswa", [block_size / s for s in seconds["bswa"]]),
        )
