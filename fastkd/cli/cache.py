"""`fastkd cache`: what a teacher, or a server's log-probabilities, say of the training data, kept for `fastkd distill`.

It takes the options of `fastkd distill`, of which those of training have no effect; --method says what is needed.
"""

from fastkd.cli import distill


def main(argv: list[str]) -> int:
    import datasets
    from transformers.utils import logging

    from fastkd.cli import arguments

    run = arguments.parse(argv, "cache")
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    if run.model.finetune_teacher:
        raise ValueError("finetune_teacher: fine-tune the teacher first, with fastkd finetune")
    trainer, *_, summary = distill.prepare(run)
    print(f"{summary}\ncache: {trainer.cache.summary()}, in {trainer.cache.folder}")
    return 0
