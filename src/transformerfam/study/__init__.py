"""Study: the rows of one reading improved by gradient, while all weights stay.

`rows` are what learns; `document` is the text in pieces, `lessons` what the model makes of them; `study` is the loop
and `checkpoint` what it keeps.

May import: `training`, `tasks`, `weights`, `fam`, `decoder`, and the root of the package.
One more kind of lesson: a line in `lessons.PROMPTS`.
"""
