"""Models by name or folder, and memories as files.

`models.load_model` and `pretrained` (transformers' `from_pretrained`) return converted models; `adapter` saves and
loads prompt, LoRA and a saved FAM in one folder, of which `folders` names the files; `eight_bit` stores small models in
8 bits; `peft_adapters` reads folders of
PEFT; `memories` has a row for every kind of memory, FAM and rivals, through which any is attached, saved and loaded.

May import: `rivals`, `fam`, `decoder`, and the root of the package.
One more shipped model: a module as `smollm2`, and an entry of `models.NAMED_MODELS`. One more kind of memory: a row of
`memories.KINDS`.
"""
