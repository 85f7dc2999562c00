"""What InsightFace's users bring along, and want back: its training records, its verification sets, its centres."""

from .centres import load_centres, save_centres
from .records import RecordDataset
from .verification_sets import load_bin

__all__ = ["RecordDataset", "load_bin", "load_centres", "save_centres"]
