"""What attaches to other people's tools, and what looks into a memory.

lm-evaluation-harness (`lm_eval`), transformers' Trainer (`transformers_trainer`), plans of memory and time without
weights (`plan`, `fake_model`, `costs`), attention as records and pictures.

May import: every room but `cli` and `comparison`.
"""
