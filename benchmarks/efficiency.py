"""How near is reading to the machine's limit? Operations per second over the speed of the model's own products."""

from collections.abc import Iterator

import torch

from benchmarks.harness import Row, alternate, ratios, row, spread
from benchmarks.models import next_block
from benchmarks.placement import PLACEMENT
from transformerfam.fam.compiled import compile_reading
from transformerfam.tools.costs import ModelShape, block_flops


def _products(shape: ModelShape, num_rows: int) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], int]:
    """Return operands of one layer's matrix products for so many rows, and their operations."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(PLACEMENT.device, PLACEMENT.dtype)

    pairs = [(draw(num_rows, width), draw(out, width)) for width, out in shape.layer_matrices]
    return pairs, num_rows * shape.flops_per_row // shape.num_layers


@torch.no_grad()
def run(model: str = "smollm2", repeats: int = 7, quick: bool = False) -> Iterator[Row]:
    """Time one block of FAM, plain and compiled, and one layer's matrix products for the same rows, in turn."""
    for block_size, fam_length in ((64, 4),) if quick else ((256, 16), (512, 32), (1024, 64)):
        for num_segments in (0, 3):
            fields = {"block_size": block_size, "fam_length": fam_length, "num_memory_segments": num_segments}
            reader, read = next_block(model, **fields)
            shape = ModelShape.of(reader.config)
            pairs, product_flops = _products(shape, block_size + fam_length)

            def multiply(pairs: list[tuple[torch.Tensor, torch.Tensor]] = pairs, times: int = shape.num_layers) -> None:
                for _ in range(times):
                    for rows, matrix in pairs:
                        torch.nn.functional.linear(rows, matrix)

            sides = {"fam": read, "products": multiply}
            if not quick:
                compiled, sides["fam_compiled"] = next_block(model, **fields)
                compile_reading(compiled)
            seconds = alternate(sides, repeats)
            limit = [product_flops * shape.num_layers / s for s in seconds.pop("products")]
            for system, times in seconds.items():
                speed = [block_flops(shape, reader.fam_config) / s for s in times]
                yield row(
                    "efficiency",
                    system=system,
                    model=model,
                    **fields,
                    num_tokens=block_size,
                    **spread("ratio", ratios(speed, limit)),
                    **spread("flops_per_second_read", speed),
                    **spread("flops_per_second_products", limit),
                    **spread("tokens_per_second_fam", [block_size / s for s in times]),
                )
