"""What a teacher says of every training example, kept in a folder, so that it runs once, or elsewhere.

The folder has an index (what the cache was made from, and what it holds), the teacher's head where the states before it are
kept, and shards of so many examples each. A cache that was made from anything else is refused, never used.
"""

from .contents import Contents, Options
from .opening import Absent, Processes, Teacher, complete, opened
from .shards import BATCH_KEY, Collator, Reader

__all__ = [
    "BATCH_KEY", "Absent", "Collator", "Contents", "Options", "Processes", "Reader", "Teacher", "complete", "opened",
]  # fmt: skip
