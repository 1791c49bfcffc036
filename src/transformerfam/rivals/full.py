"""Full attention: the ordinary model, whose keys and values are all kept."""

from transformerfam.rivals.rival import Rival


class FullAttention(Rival):
    """One segment that never ends: bytes grow with the text, time with its square."""

    is_endless = True
    has_memory = False


RIVAL = FullAttention
