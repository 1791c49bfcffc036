"""What a memory costs, or is worth, before any training: the divergence from full attention, block by block.

    fam data fetch books --folder runs/data
    python scripts/measure_untrained.py runs/data/books/test/novels/persuasion.txt

Every system reads the same passages; a row has KL(full attention, own) in nats per token, by block.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div

from transformerfam import FamConfig, convert
from transformerfam.decoder.as_base import as_base, head_of_base
from transformerfam.fam.prompt import set_prompt
from transformerfam.tasks.text import encode
from transformerfam.weights.models import load_base

BLOCK: dict[str, Any] = {"block_size": 256, "num_memory_segments": 0}


def gated(length: int, **changes: Any) -> FamConfig:
    """Return a gated memory of so many rows."""
    return FamConfig.preset(changes.pop("preset", "gated"), fam_length=length, **BLOCK | changes)


SYSTEMS: dict[str, tuple[FamConfig, bool]] = {
    "window": (FamConfig(fam_length=0, **BLOCK), False),
    "window, 4 sink tokens": (FamConfig(fam_length=0, num_sink_tokens=4, **BLOCK), False),
    "window of 272, 4 sink tokens": (FamConfig(fam_length=0, num_sink_tokens=4, **BLOCK | {"block_size": 272}), False),
    "gated 16": (gated(16), True),
    "gated 16, 4 sink tokens": (gated(16, num_sink_tokens=4), True),
    "gated 16, 4 sink tokens, starts empty": (gated(16, num_sink_tokens=4, fam_starts_empty=True), True),
    "gated 64, 4 sink tokens, starts empty": (gated(64, num_sink_tokens=4, fam_starts_empty=True), True),
    "gated_rows 16, 4 sink tokens, starts empty": (
        gated(16, preset="gated_rows", num_sink_tokens=4, fam_starts_empty=True),
        True,
    ),
}
"""Systems, and whether their rows begin as text."""


def measure(model: Any, ids_BT: torch.Tensor) -> list[float]:
    """Return the divergence from full attention, the mean over passages, for every 256 tokens."""
    found = []
    for ids_1T in ids_BT.split(1):
        with torch.no_grad():
            own = model(input_ids=ids_1T).logits.log_softmax(-1)
        with as_base(model) as read:
            full = head_of_base(model)(read(ids_1T).last_hidden_state).log_softmax(-1)
        found.append(kl_div(own, full, reduction="none", log_target=True).sum(-1)[0])
    return [float(block.mean()) for block in torch.stack(found).split(BLOCK["block_size"], dim=1)]


def main() -> None:
    """Measure every system and print its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--passages", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    for name, (config, begins_as_text) in SYSTEMS.items():
        model, tokenizer = load_base(options.model)
        ids = torch.tensor(encode(tokenizer, options.text.read_text(encoding="utf-8")))
        starts = [len(ids) * n // (options.passages + 1) for n in range(1, options.passages + 1)]
        passages = torch.stack([ids[start : start + options.tokens] for start in starts])
        convert(model, config)
        if begins_as_text:  # the passage in front of the first one
            set_prompt(model, ids[starts[0] - 64 : starts[0]].tolist())
        row = {
            "system": name,
            "text": options.text.name,
            "kl_by_block": [round(x, 4) for x in measure(model, passages)],
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
