"""What is trained on: rows of the recipe's task put into batches, packed instructions, and the files that are read.

May import: `recipe`, and what `training` may.
One more kind of sequence: a task, see `tasks`.
"""
