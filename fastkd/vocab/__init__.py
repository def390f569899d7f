"""A smaller vocabulary for the student: the map, its tokenizer, what a corpus loses by it, and the heads that are compared."""

from fastkd.vocab.map import METHODS, VocabMap

__all__ = ["METHODS", "VocabMap"]
