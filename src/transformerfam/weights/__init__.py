"""Models by name or folder, and memories as files.

`models.load_model` and `pretrained` (transformers' `from_pretrained`) return converted models; `adapter` saves and
loads prompt, LoRA and a saved FAM in one folder, of which `folders` names the files; `peft_adapters` reads folders of
PEFT.

May import: `rivals`, `fam`, `decoder`, and the root of the package.
One more shipped model: a module as `smollm2`, and an entry of `models.NAMED_MODELS`.
"""
