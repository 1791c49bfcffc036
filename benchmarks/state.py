"""What does it cost to keep a reading? Seconds and bytes of save, load and fork."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.harness import Row, alternate, row, spread
from benchmarks.models import converted, random_tokens
from transformerfam import FamState


@torch.no_grad()
def run(model: str = "smollm2", repeats: int = 7, quick: bool = False) -> Iterator[Row]:
    """Save, load and fork a reading of two blocks, for m = 0 and 3."""
    block_size, fam_length = (64, 4) if quick else (1024, 64)
    for num_segments in (0, 3):
        fields = {"block_size": block_size, "fam_length": fam_length, "num_memory_segments": num_segments}
        reader = converted(model, **fields)
        state = reader.read(random_tokens(model, 2 * block_size))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "reading.safetensors"
            sides = {
                "save": lambda state=state, path=path: state.save(path),
                "load": lambda reader=reader, path=path: FamState.load(path, reader),
                "fork": state.fork,
            }
            seconds = alternate(sides, repeats)
            yield row(
                "state",
                model=model,
                **fields,
                num_tokens=2 * block_size,
                **{k: v for name, times in seconds.items() for k, v in spread(f"seconds_{name}", times).items()},
                bytes_state=state.num_bytes,
                bytes_file=path.stat().st_size,
            )
