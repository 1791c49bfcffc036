"""Read a long text once, keep it in a small file, load the file and ask. Runs in seconds on a CPU.

python examples/read_and_ask.py [--model tiny|FOLDER] [--key 62715] [--sentences 2000]
"""

import argparse
import tempfile
from pathlib import Path

from write_text import passkey_text

from transformerfam import FamState
from transformerfam.weights.models import load_model


def main() -> None:
    """Read, save, load, ask twice."""
    parser = argparse.ArgumentParser(description="Read a long text once, keep it, and ask.")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--key", type=int, default=62715)
    parser.add_argument("--sentences", type=int, default=2000)
    given = parser.parse_args()
    model, tokenizer = load_model(given.model)

    ids = tokenizer(passkey_text(given.key, given.sentences), return_tensors="pt").input_ids
    state = model.read(ids)  # any length, constant memory
    cache = 2 * model.config.num_hidden_layers * model.config.hidden_size * 4 * ids.shape[1]
    print(f"read {state.num_tokens_read:,} tokens; state {state.num_bytes:,} bytes, a key/value cache {cache:,}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "book.fam.safetensors"
        state.save(path)
        kept = FamState.load(path, model)  # next week, in another process

    # What follows a text has no begin-of-text token in front.
    question = tokenizer(" What is the pass key? The pass key is", add_special_tokens=False, return_tensors="pt")
    for _ in range(2):  # fork: the reading stays as it is
        # A space and the digits are one token each for the tiny model.
        length = 1 + len(str(given.key))
        answer = model.generate(question.input_ids, past_key_values=kept.fork(), max_new_tokens=length, do_sample=False)
        print(tokenizer.decode(answer[0, question.input_ids.shape[1] :]).strip())


if __name__ == "__main__":
    main()
