"""The judges: FAM (`fam`) and a layer of a decoder (`layer`), as plain loops over plain tensors.

They are written from the paper, and share no code with what they judge. Those of rivals and families are in the tests.

May import: `config` and `errors`.
"""

from transformerfam.old_paths import names_of

__getattr__ = names_of("transformerfam.reference", "transformerfam.reference.fam")
