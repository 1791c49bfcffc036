"""TransformerFAM: the paper, on the seams of `decoder`.

`convert` puts a memory into a model and has it checked with numbers (`checks`; `unlisted`, `layer_checks` and
`layer_probes` for a family without a row); `memory` holds the new parameters, `initial` makes the initial FAM, `prompt`
what it begins as; `start` begins a reading; `state`, `layer` and `masks` say what a reading keeps and what is seen of
it; `piece` is Algorithms 1 and 2, of which `rows` has the update of FAM; `compiled` runs them as one graph.

May import: `decoder`, and the root of the package.
One more choice of the update: a field of `config.FamConfig`, the loops of `reference.fam`, then `rows` or `piece`.
"""
