"""The protocols by which verification and identification are judged, over tiles of cosines that are counted and forgotten.

Features are tensors on any device or NumPy arrays, normalized inside. Results print as a table, ``as_json()`` gives them in
plain types, and :func:`figure` draws them. Needs NumPy.
"""

from .all_pairs import Verification, verification
from .distractors import MegaFace, megaface
from .identification import OpenSet, open_set
from .lfw_blufr import Blufr, Trial, blufr, load_blufr
from .pair_lists import Pairs, TemplatePairs, pairs, template_pairs
from .results import Result, figure

__all__ = [
    "Blufr",
    "MegaFace",
    "OpenSet",
    "Pairs",
    "Result",
    "TemplatePairs",
    "Trial",
    "Verification",
    "blufr",
    "figure",
    "load_blufr",
    "megaface",
    "open_set",
    "pairs",
    "template_pairs",
    "verification",
]
