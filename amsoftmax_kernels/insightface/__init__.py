"""What InsightFace's users bring along, and want back: training records, verification sets, centres, margins."""

from typing import TYPE_CHECKING, Any

from .centres import load_centres, save_centres
from .margin_lists import margin_of
from .verification_sets import load_bin

if TYPE_CHECKING:
    from .records import RecordDataset

__all__ = ["RecordDataset", "load_bin", "load_centres", "margin_of", "save_centres"]


# What needs NumPy, which centres do not.
def __getattr__(name: str) -> Any:
    if name == "RecordDataset":
        from .records import RecordDataset

        return RecordDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
