"""`fastkd finetune`: a model, labelled data; a trained model, such as a teacher, and a report about it."""

from . import distill


def main(argv: list[str]) -> int:
    return distill.main(argv, "finetune")
