"""Print the rows of docs/reference/states.md: bytes of a state in RAM and in files, and what rounding one costs.

python scripts/state_bytes.py tiny 1024
python scripts/state_bytes.py smollm2 2048
"""

import tempfile
from pathlib import Path

import torch
import typer

from transformerfam import FamState
from transformerfam.tasks.text import encode, read_text
from transformerfam.weights.models import load_model

NUM_SCORED = 128
PASSKEY = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
PASSKEY += "The pass key is 71432. Remember it. 71432 is the pass key. "
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


@torch.no_grad()
def main(model: str, tokens: int) -> None:
    """Read so many tokens, save them in two ways, and score what follows after each."""
    loaded, tokenizer = load_model(model)
    text = PASSKEY + FILLER * 200 if model == "tiny" else read_text("persuasion")
    ids = torch.tensor([encode(tokenizer, text)[: tokens + NUM_SCORED]])
    state = loaded.read(ids[:, :tokens])
    row, logits = {"ram": state.num_bytes, "compact": state.fork().compact().num_bytes}, {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in (None, "bfloat16"):
            path = Path(folder) / str(dtype)
            state.save(path, dtype=dtype)
            restored = FamState.load(path, loaded)
            output = loaded(input_ids=ids[:, tokens:], past_key_values=restored)
            logits[dtype] = output.logits[0, :-1]
            row[f"file {dtype}"] = path.stat().st_size
            row[f"loss {dtype}"] = torch.nn.functional.cross_entropy(logits[dtype], ids[0, tokens + 1 :]).item()
    row["largest change of a logit"] = (logits[None] - logits["bfloat16"]).abs().max().item()
    print(row)


if __name__ == "__main__":
    typer.run(main)
