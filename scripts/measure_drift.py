"""Measure how far the FAM drifts from float32 over 1,000 updates when the model runs in bfloat16.

    python scripts/measure_drift.py --output runs/fam_drift.jsonl

One random Llama of the tiny shape reads the same 1,000 blocks in float32 and, with its FAM kept in float32 or in
bfloat16, in bfloat16. Rows give the relative error of all layers' FAM against the float32 reading.
"""

import argparse
import copy

import torch

from transformerfam import FamConfig, convert
from transformerfam.reports.rows import RowFile
from transformerfam.tasks.provenance import provenance
from transformerfam.training.recipe.recipe import ModelSection
from transformerfam.training.tiny import build_tiny_model

REPORTED_UPDATES = (1, 10, 100, 300, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.manual_seed(options.seed)
    base = build_tiny_model(ModelSection(base="tiny-random"), vocab_size=60)
    shape = {"block_size": 16, "fam_length": 4, "num_memory_segments": 0}
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(60, (1, 16 * REPORTED_UPDATES[-1]), generator=generator)
    with RowFile(options.output) as rows:
        for bound in (None, 5.0):
            fams = {}
            for model_dtype, fam_dtype in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
                model = copy.deepcopy(base).to(getattr(torch, model_dtype))
                convert(model, FamConfig(**shape, fam_key_bias=0.0, fam_norm_bound=bound, fam_dtype=fam_dtype))
                state, done = None, 0
                for updates in REPORTED_UPDATES:
                    state = model.read(ids[:, 16 * done : 16 * updates], state)
                    done = updates
                    fams[model_dtype, fam_dtype, updates] = state.fams.double()
            for (model_dtype, fam_dtype, updates), fam in fams.items():
                exact = fams["float32", "float32", updates]
                row = {
                    "task": "fam_drift",
                    "model_dtype": model_dtype,
                    "fam_dtype": fam_dtype,
                    "fam_norm_bound": bound,
                    "num_updates": updates,
                    "fam_rms": float(fam.square().mean().sqrt()),
                    "relative_error": float((fam - exact).norm() / exact.norm()),
                    "seed": options.seed,
                    **provenance(),
                }
                rows.append(row)
                print(
                    f"bound {bound} {model_dtype} fam {fam_dtype} {updates:5} {row['relative_error']:.2e}", flush=True
                )


if __name__ == "__main__":
    main()
