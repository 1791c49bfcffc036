"""What is trained on: sequences of every task, drawn, mixed and put into batches.

May import: `recipe`, and what `training` may.
One more kind of sequence: a writer here, and its choice in `sequences`.
"""
