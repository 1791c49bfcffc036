"""Measure how different the rows of a trained FAM are, and in how many directions they carry the key.

    python scripts/measure_rows.py --model smollm2 --output runs/smollm2_fam_rows.jsonl

24 keys are given and one block is read. Per layer: the mean cosine between two rows of one FAM (1: they are all the
same), and the effective rank (participation ratio) of what differs from key to key, over the rows of one FAM.
"""

import argparse

import torch
from torch.nn import functional as F

from transformerfam.reports.rows import RowFile
from transformerfam.tasks.passkey import PasskeyText, draw_keys
from transformerfam.tasks.provenance import provenance
from transformerfam.weights.models import load_model

NUM_KEYS = 24


def cosine_of_rows(fam_BFD: torch.Tensor) -> float:
    """Return the mean cosine between two different rows of one FAM."""
    unit_BFD = F.normalize(fam_BFD, dim=-1)
    cosine_BFF = unit_BFD @ unit_BFD.transpose(1, 2)
    length = cosine_BFF.shape[-1]
    return ((cosine_BFF.sum((1, 2)) - length) / (length * (length - 1))).mean().item()


def rank_of_key(fam_BFD: torch.Tensor) -> float:
    """Return the mean effective rank of each FAM's rows after the mean over keys is taken away."""
    power_BF = torch.linalg.svdvals(fam_BFD - fam_BFD.mean(0)).square()
    return (power_BF.sum(-1).square() / power_BF.square().sum(-1)).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--output", required=True, help="JSON lines")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    model, tokenizer = load_model(options.model)
    block_size = model.fam_config.block_size
    text, keys = PasskeyText(tokenizer), draw_keys(NUM_KEYS, 0)
    ids_BT = torch.tensor([text.sequence(key, block_size).ids[:block_size] for key in keys])
    with torch.no_grad():
        fams_LBFD = model.read(ids_BT, model.init_state(NUM_KEYS), progress=False).fams.float()
    row = {
        "task": "fam_rows",
        "model": options.model,
        "block_size": block_size,
        "cosine_of_rows_by_layer": [round(cosine_of_rows(fam), 3) for fam in fams_LBFD],
        "rank_of_key_by_layer": [round(rank_of_key(fam), 2) for fam in fams_LBFD],
        **provenance(),
    }
    with RowFile(options.output) as rows:
        rows.append(row)
    for name in ("cosine_of_rows_by_layer", "rank_of_key_by_layer"):
        print(name, "median", sorted(row[name])[len(fams_LBFD) // 2], row[name], flush=True)


if __name__ == "__main__":
    main()
