"""The systems that TransformerFAM is compared with, each right, small and tested.

Every rival is one module of the same shape: what it puts before and after a segment, what it does to a layer, and
what it carries. `attach(model, RivalConfig(system=...))` gives it to any model that `convert` serves; the model then
reads, trains, generates and is evaluated like a converted one. Rivals that are choices of `FamConfig` are `presets`;
`start` begins a reading, `files` saves and loads.

May import: `fam`, `decoder`, and the root of the package.
One more rival: a module of that shape, its name and fields in `config`, its equations in `tests/rival_reference.py`.
"""

from transformerfam.rivals.attach import attach, rival_class
from transformerfam.rivals.config import RIVAL_NAMES, RivalConfig
from transformerfam.rivals.presets import PRESETS, preset
from transformerfam.rivals.state import RivalState

__all__ = ["PRESETS", "RIVAL_NAMES", "RivalConfig", "RivalState", "attach", "preset", "rival_class"]
