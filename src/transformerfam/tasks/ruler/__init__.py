"""RULER's thirteen tasks in their published words, in texts of any length.

Source: Hsieh et al., 2024, RULER: What's the Real Context Size of Your Long-Context Language Models?
(github.com/NVIDIA/RULER, scripts/data/synthetic, of which lm-eval has a copy). The texts are this package's own; the
words of prompts and needles, their numbers and places, and the lengths of answers are the published ones.
"""

from functools import partial

from transformerfam.tasks.made_questions import MadeTask, Prepare
from transformerfam.tasks.ruler.lists import prepare_cwe, prepare_fwe, prepare_vt
from transformerfam.tasks.ruler.niah import NEEDLES, prepare_named
from transformerfam.tasks.ruler.parts import Parts
from transformerfam.tasks.ruler.qa import Questions


def ruler_tasks(parts: Parts) -> dict[str, MadeTask]:
    """Return the tasks by name."""
    prepared: dict[str, Prepare] = {
        **{name: prepare_named(name, parts) for name in NEEDLES},
        "vt": prepare_vt,
        "cwe": partial(prepare_cwe, parts),
        "fwe": prepare_fwe,
        "qa_1": Questions("squad", parts).prepare,
        "qa_2": Questions("hotpotqa", parts).prepare,
    }
    return {name: MadeTask(name=name, prepare=prepare) for name, prepare in prepared.items()}
