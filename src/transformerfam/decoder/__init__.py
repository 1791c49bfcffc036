"""What any memory needs of a transformers decoder.

A decoder's own forward runs piece by piece (`pieces`), through hooks in its layers (`seams`) that hand what goes
through to a step (`step`): FAM's piece, or a rival's. Here is all that knows families of models, attention back ends
and positions; nothing here knows what a memory keeps.

May import: the root of the package.
One more family: a row in `families`, a line in `docs/reference/families.md`, an entry in the tests' `tiny_families.py`.
One more attention back end: `kernels` or `flash`, and `structure`.
"""
