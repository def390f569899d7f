"""A smaller vocabulary for the student: the map, its tokenizer, its coverage of a corpus, and the heads that are compared."""

from fastkd.vocab.map import METHODS, VocabMap

__all__ = ["METHODS", "VocabMap"]
