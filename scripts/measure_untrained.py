"""Find the start from which training has least to repair: next-token loss of a converted, untrained model.

    python scripts/measure_untrained.py --output runs/untrained.jsonl

Every candidate is a prompt and a bias on the FAM keys' logits; the yardstick is BSWA of the same block and memory
segments (`bswa` in the rows), which the default may exceed by 2 %.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from transformerfam import FamConfig, convert
from transformerfam.fam.convert import fam_parameters
from transformerfam.reports.rows import RowFile
from transformerfam.tasks.next_token import evaluate_next_token
from transformerfam.tasks.novels import load_novel
from transformerfam.weights.models import load_smollm2

PROMPTS = ("mean", "random_tokens", "first_token", "zeros")
BIASES = (0.0, -4.0, -8.0, -16.0, -32.0)


def prompt_rows(kind: str, embedding: torch.Tensor, fam_length: int, first_token: int) -> torch.Tensor | None:
    """Return a candidate for the prompt, `(F, D)`; None keeps what `convert` made."""
    if kind == "mean":
        return None
    if kind == "random_tokens":
        generator = torch.Generator().manual_seed(0)
        return embedding[torch.randint(len(embedding), (fam_length,), generator=generator)]
    if kind == "first_token":
        return embedding[first_token].expand(fam_length, -1)
    return torch.zeros(fam_length, embedding.shape[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument("--num-tokens", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--fam-length", type=int, default=16)
    parser.add_argument("--num-memory-segments", type=int, default=0)
    parser.add_argument("--prompts", default=",".join(PROMPTS))
    parser.add_argument("--biases", default=",".join(map(str, BIASES)))
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    shape = {"block_size": options.block_size, "num_memory_segments": options.num_memory_segments}
    candidates = [("bswa", 0.0, FamConfig(**shape, fam_length=0))]
    for kind in options.prompts.split(","):
        for bias in map(float, options.biases.split(",")):
            candidates.append((kind, bias, FamConfig(**shape, fam_length=options.fam_length, fam_key_bias=bias)))
    text = Path(tempfile.mkdtemp()) / "northanger_abbey.txt"
    text.write_text(load_novel("northanger_abbey"), encoding="utf-8")
    with RowFile(options.output) as rows:
        for kind, bias, config in candidates:
            model, tokenizer = load_smollm2()
            convert(model, config)
            embedding = model.get_input_embeddings().weight.detach()
            with torch.no_grad():
                for parameter in fam_parameters(model):
                    new = prompt_rows(kind, embedding, config.fam_length, tokenizer.bos_token_id)
                    if new is not None:
                        parameter.copy_(new)
            system = "bswa" if kind == "bswa" else "fam_untrained"
            for row in evaluate_next_token(
                model, tokenizer, text, num_tokens=options.num_tokens, system=system, model_name="smollm2"
            ):
                row |= {"prompt": kind, "fam_key_bias": bias, **shape, "fam_length": config.fam_length}
                rows.append(row)
                print(f"{kind:14} bias {bias:6} loss {row['loss']:.4f}", flush=True)


if __name__ == "__main__":
    main()
