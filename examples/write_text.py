"""Write a text that gives a number on its first line and then says nothing of it.

python examples/write_text.py book.txt --key 627 --sentences 2000
"""

import argparse
from pathlib import Path

from transformerfam.tasks.filler import FILLER_SENTENCES
from transformerfam.tasks.passkey import PAPER
from transformerfam.tasks.wordings import KEY


def passkey_text(key: int, sentences: int) -> str:
    """Return the paper's introduction with the key, and so many sentences of its filler."""
    filler = [sentence.strip() + "." for sentence in FILLER_SENTENCES.split(".") if sentence.strip()]
    intro = PAPER.intro.replace(KEY, str(key))
    return " ".join([intro.strip(), *(filler[i % len(filler)] for i in range(sentences))])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a text with a pass key on its first line.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--key", type=int, default=627)
    parser.add_argument("--sentences", type=int, default=2000)
    given = parser.parse_args()
    given.file.write_text(passkey_text(given.key, given.sentences))
