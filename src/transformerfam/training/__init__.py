"""Training a memory: a recipe in, a folder with weights and a log out.

`recipe/` says what a run is; `data/` draws and writes its sequences; `step/` is one step through all blocks, with its
losses; `trainer` is the loop, which `curriculum`, `checkpoint`, `ranks`, `optimizer`, `lora` and `state_passing` serve;
`result` is what it ends with.

May import: `tasks`, `weights`, `rivals`, `fam`, `decoder`, and the root of the package.
One more key of a recipe: a field in `recipe/sections.py` and its range in `tasks/ranges.py`.
"""
