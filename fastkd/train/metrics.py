"""How good a model is at a task: `compute_metrics` for Trainer."""

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, recall_score

from .batch import LANGUAGE_TASKS

SHOWN = (
    "entity_f1", "micro_f1", "accuracy", "matthews", "pearson", "perplexity", "spearman", "cosine", "agreement", "loss",
)  # fmt: skip
SHARES = ("entity_f1", "micro_f1", "accuracy")  # of 1, and so shown in per cent


def of_task(task: str, glue: str | None = None, names: list[str] | None = None):
    """The function that Trainer calls with predictions and labels; None for language modelling (perplexity).

    glue: the GLUE task, which may have a metric of its own. names: of the classes, in the order of their numbers.
    """
    if task in LANGUAGE_TASKS:
        return None
    if task == "token_classification":
        return lambda outcome: of_tokens(outcome, names)
    special = {"regression": of_numbers, "multi_label": of_sets, "embedding": of_embeddings}
    return special.get(task) or (lambda outcome: of_classes(outcome, glue))


def of_numbers(outcome) -> dict[str, float]:
    predicted, wanted = outcome.predictions.squeeze(-1), outcome.label_ids
    pearson, spearman = pearsonr(predicted, wanted)[0], spearmanr(predicted, wanted)[0]
    return {"mse": float(((predicted - wanted) ** 2).mean()), "pearson": float(pearson), "spearman": float(spearman)}


def of_classes(outcome, glue: str | None = None) -> dict[str, float]:
    predicted, wanted = outcome.predictions.argmax(-1), outcome.label_ids
    found = {"accuracy": float(accuracy_score(wanted, predicted)), "balanced_accuracy": _recall(wanted, predicted)}
    if glue == "cola":
        found["matthews"] = float(matthews_corrcoef(wanted, predicted))
    if glue in ("mrpc", "qqp"):
        found["f1"] = float(f1_score(wanted, predicted))
    return found


def of_sets(outcome) -> dict[str, float]:
    """Of [N, C] logits, a label being predicted where its logit is above 0. accuracy: of whole sets."""
    predicted, wanted = outcome.predictions > 0, outcome.label_ids > 0
    return {
        "micro_f1": float(f1_score(wanted, predicted, average="micro", zero_division=0)),
        "macro_f1": float(f1_score(wanted, predicted, average="macro", zero_division=0)),
        "accuracy": float(accuracy_score(wanted, predicted)),
    }


def of_tokens(outcome, names: list[str] | None) -> dict[str, float]:
    """Of the labelled tokens of [N, S, C] logits; where the names are those of IOB tags, of whole entities too."""
    best, labelled = outcome.predictions.argmax(-1), outcome.label_ids != -100  # [N, S]
    predicted, wanted = best[labelled], outcome.label_ids[labelled]
    found = {
        "accuracy": float(accuracy_score(wanted, predicted)), "balanced_accuracy": _recall(wanted, predicted),
        "macro_f1": float(f1_score(wanted, predicted, average="macro", zero_division=0)),
    }  # fmt: skip
    if names and all(name == "O" or name[:2] in ("B-", "I-") for name in names):
        theirs, ours = (
            {(row, *entity) for row, (tags, kept) in enumerate(zip(side, labelled, strict=True))
             for entity in entities([names[i] for i in tags[kept]])}
            for side in (outcome.label_ids, best)
        )  # fmt: skip
        found["entity_f1"] = 2 * len(theirs & ours) / max(len(theirs) + len(ours), 1)
    return found


def entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """(type, first, end) of each entity in IOB tags. As in conlleval, an I- that continues nothing begins an entity."""
    found, kind, first = set(), None, 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if prefix == "I" and name == kind:
            continue
        if kind is not None:
            found.add((kind, first, i))
        kind, first = (name, i) if prefix in ("B", "I") else (None, i)
    return found


def of_embeddings(outcome) -> dict[str, float]:
    """Predictions are the student's embeddings, the teacher's, and the examples' numbers, of which 2i and 2i + 1 are a pair
    where there are scores of pairs.

    cosine: of both embeddings of a text, the mean, where their widths agree. agreement: the Spearman correlation of the
    similarities that student and teacher find between neighbouring texts. spearman: of the student's with the scores.
    """
    student, teacher, *numbers = outcome.predictions
    order = numbers[0].argsort() if numbers else np.arange(len(student))
    student, teacher = (x[order] / np.linalg.norm(x[order], axis=1, keepdims=True) for x in (student, teacher))
    found = {}
    if student.shape == teacher.shape:
        found["cosine"] = float((student * teacher).sum(1).mean())
    if len(student) > 2:
        ours, theirs = ((x[:-1] * x[1:]).sum(1) for x in (student, teacher))
        found["agreement"] = float(spearmanr(ours, theirs)[0])
    scores = outcome.label_ids[order]
    if not np.isnan(scores).any() and len(scores) > 2:
        found["spearman"] = float(spearmanr((student[::2] * student[1::2]).sum(1), scores[::2])[0])
    return found


def _recall(wanted, predicted) -> float:
    """The mean recall over the classes that there are, which does not reward the most frequent one."""
    return float(recall_score(wanted, predicted, labels=sorted(set(wanted.tolist())), average="macro", zero_division=0))
