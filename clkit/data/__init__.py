"""Datasets as tensors, and streams of tasks made from them: class-, domain- and task-incremental."""

from clkit.data.augment import BYTES, NO_AUGMENT, Augment, Normalize
from clkit.data.characters import FONTS, SCRIPTS, glyphs
from clkit.data.core import Batch, Dataset, Examples, Scenario, Stream, Task
from clkit.data.folders import folder, folders
from clkit.data.sets import TORCHVISION, digits, load
from clkit.data.streams import cumulative, domains, permutations, permuted, rotated, split

__all__ = [
    "BYTES",
    "FONTS",
    "NO_AUGMENT",
    "SCRIPTS",
    "TORCHVISION",
    "Augment",
    "Batch",
    "Dataset",
    "Examples",
    "Normalize",
    "Scenario",
    "Stream",
    "Task",
    "cumulative",
    "digits",
    "domains",
    "folder",
    "folders",
    "glyphs",
    "load",
    "permutations",
    "permuted",
    "rotated",
    "split",
]
