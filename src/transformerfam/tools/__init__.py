"""What attaches to other people's tools, and what looks into a memory.

lm-evaluation-harness (`lm_eval`), callbacks and trackers of transformers' Trainer (`callbacks`), plans of memory and
time without weights (`plan`, `fake_model`, `costs`), attention as records and pictures.

May import: every room but `cli` and `comparison`.
"""
