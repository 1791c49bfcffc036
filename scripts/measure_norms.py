"""Measure how the FAM of every layer grows from block to block, on SmolLM2 reading a held-out novel.

    python scripts/measure_norms.py --output runs/smollm2_fam_norms.jsonl

Rows give the mean root mean square of the FAM's rows after some updates, the largest change that one update makes, and
the median root mean square of the tokens that enter the same layer.
"""

import argparse

import torch

from transformerfam import FamConfig, convert
from transformerfam.reports.rows import RowFile
from transformerfam.tasks.novels import load_novel
from transformerfam.tasks.provenance import provenance
from transformerfam.tasks.text import encode
from transformerfam.weights.models import load_smollm2

REPORTED_UPDATES = (1, 2, 3, 6, 12, 33)


def rms(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().mean(-1).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument("--fam-norm-bound", type=float)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    model, tokenizer = load_smollm2()
    config = FamConfig(
        block_size=64, fam_length=8, num_memory_segments=0, fam_key_bias=0.0, fam_norm_bound=options.fam_norm_bound
    )
    convert(model, config)
    ids = torch.tensor(encode(tokenizer, load_novel("northanger_abbey")[:40_000]))
    with torch.no_grad():
        hidden = model(input_ids=ids[None, :64], output_hidden_states=True).hidden_states[:-1]
    token_rms = rms(torch.stack(hidden)[:, 0]).median(-1).values
    state = model.init_state()
    before = state.fams
    with RowFile(options.output) as rows:
        for update in range(1, REPORTED_UPDATES[-1] + 1):
            model.read(ids[64 * (update - 1) : 64 * update], state)
            fams = state.fams
            change, before = rms(fams - before)[:, 0].amax(-1), fams
            if update not in REPORTED_UPDATES:
                continue
            row = {
                "task": "smollm2_fam_norms",
                "fam_norm_bound": options.fam_norm_bound,
                "num_updates": update,
                "fam_rms_by_layer": [round(x, 2) for x in rms(fams)[:, 0].mean(-1).tolist()],
                "change_rms_by_layer": [round(x, 2) for x in change.tolist()],
                "token_rms_by_layer": [round(x, 2) for x in token_rms.tolist()],
                **provenance(),
            }
            rows.append(row)
            print(update, "FAM", max(row["fam_rms_by_layer"]), "change", max(row["change_rms_by_layer"]), flush=True)


if __name__ == "__main__":
    main()
