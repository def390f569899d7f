"""The methods by name, which of them makes sense where, and how "--method" is read.

"kd", "bert_emd:beta=0.005", "fcd + kd:weight=0.5,alpha=0.7": one method or several, each with its options and a weight.
A third party adds one through the entry-point group `fastkd.methods`, the entry's name being the method's, or by `register`.
"""

import ast
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from fastkd import checks
from fastkd.train.batch import LANGUAGE_TASKS, PREDICTING_TASKS, SENTENCE_TASKS, TASKS, Batch

from .base import Method, Setup, Side, Term

__all__ = ["METHODS", "Combined", "Method", "Setup", "Side", "Term", "build", "refusal", "register", "table"]

GROUP = "fastkd.methods"
ATTENTION = {False: "bidirectional", True: "causal"}


class Entry(NamedTuple):
    """Where a method lives, and where it makes sense.

    causal: it is for models with causal attention only (True), with bidirectional attention only (False), for both (None);
    otherwise: why it is not for the others.
    """

    where: str
    causal: bool | None = None
    tasks: tuple[str, ...] = TASKS
    otherwise: str = ""


_NEXT_TOKEN = "it compares distributions of the next token; for other predictions choose kd or glmd"
METHODS = {
    "kd": Entry("kd:KD", None, PREDICTING_TASKS),
    "fcd": Entry("fcd:FCD"),
    "bert_emd": Entry("bert_emd:BertEMD", None, PREDICTING_TASKS),
    "codir": Entry(
        "codir:CoDIR",
        False,
        ("classification", "masked_lm"),
        "it contrasts sentences by their first tokens, which have not seen the sentence",
    ),
    "glmd": Entry("glmd:GLMD", None, ("masked_lm", "causal_lm", "cloze")),
    "pkd": Entry("pkd:PKD", None, SENTENCE_TASKS),
    "distilbert": Entry("distilbert:DistilBERT", None, LANGUAGE_TASKS),
    "tinybert": Entry("tinybert:TinyBERT"),
    "minilm": Entry("minilm:MiniLM"),
    "minilmv2": Entry("minilmv2:MiniLMv2"),
    "embedding": Entry("embedding:Embedding", None, ("embedding",)),
    "forward_kl": Entry("forward_kl:ForwardKL", True, ("causal_lm",), _NEXT_TOKEN),
    "reverse_kl": Entry("reverse_kl:ReverseKL", True, ("causal_lm",), _NEXT_TOKEN),
    "jsd": Entry("jsd:JSD", True, ("causal_lm",), _NEXT_TOKEN),
    "skew_kl": Entry("skew_kl:SkewKL", True, ("causal_lm",), _NEXT_TOKEN),
}


_registered: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """`@register("mine")` above a class makes it the method "mine" in this process."""
    if name in METHODS:
        raise ValueError(f"name: {name!r} is one of fastkd's own methods; choose another name")

    def add(kind: type[Method]) -> type[Method]:
        _registered[name] = kind
        return kind

    return add


def _third_parties() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


def find(name: str) -> type[Method]:
    if name in METHODS:
        module, kind = METHODS[name].where.split(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), kind)
    if name in _registered:
        return _registered[name]
    others = _third_parties()
    if name not in others:
        known = ", ".join((*METHODS, *_registered, *others))
        raise ValueError(f"method: there is no {name!r}; there are {known}")
    return others[name].load()


def refusal(name: str, causal: bool, task: str | None = None) -> str | None:
    """Why this method makes no sense for models of causal or bidirectional attention (or for the task); None if it does."""
    if name not in METHODS:
        return None  # a third party's method knows best
    entry = METHODS[name]
    if entry.causal is not None and entry.causal != causal:
        return f"{name} makes no sense for a model with {ATTENTION[causal]} attention: {entry.otherwise}"
    if task is not None and task not in entry.tasks:
        return f"{name} makes no sense for the task {task}; it is for {named_tasks(name)}"
    return None


def named_tasks(name: str) -> str:
    """The tasks that a method is for, as one says it."""
    tasks = METHODS[name].tasks
    missing = [task for task in TASKS if task not in tasks]
    return "all" if not missing else f"all but {missing[0]}" if len(missing) == 1 else ", ".join(tasks)


def table() -> str:
    """The table of methods and models in docs/trainer.md."""
    head = ("method", *(f"{attention} attention" for attention in ATTENTION.values()), "tasks")
    rows = [head, tuple("---" for _ in head)]
    for name in METHODS:
        marks = ("yes" if refusal(name, causal) is None else "–" for causal in ATTENTION)
        rows.append((f"`{name}`", *marks, named_tasks(name)))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def parse(text: str) -> list[tuple[str, dict]]:
    """ "fcd + kd:weight=0.5,alpha=0.7" -> [("fcd", {}), ("kd", {"weight": 0.5, "alpha": 0.7})]."""
    found = []
    for part in text.split("+"):
        name, _, options = part.strip().partition(":")
        given = {}
        for option in filter(None, options.split(",")):
            key, equals, value = option.partition("=")
            if not equals:
                raise ValueError(f"method: expected option=value in {part.strip()!r}, got {option!r}")
            given[key.strip()] = _literal(value.strip())
        if name in dict(found):
            raise ValueError(f"method: {name} is named twice in {text!r}")
        found.append((name, given))
    return found


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a word


class Combined(nn.Module):
    """The weighted sum of methods; what the trainer calls. Its terms are named method/term."""

    def __init__(self, methods: dict[str, Method], weights: dict[str, float]):
        super().__init__()
        self.methods, self.weights = nn.ModuleDict(methods), weights
        for method in methods.values():
            method.alone = len(methods) == 1

    def forward(self, batch: Batch) -> dict[str, Term]:
        terms = {}
        for name, method in self.methods.items():
            try:
                made = method(batch)
            except checks.NotFiniteError:  # then the trainer skips the step, as where values cannot be looked at
                parts = [*batch.student.tensors(), *method.parameters()]
                made = {"cost": Term(sum(x.float().sum() for x in parts) * torch.nan, 1.0)}
            for part, term in made.items():
                terms[f"{name}/{part}"] = term._replace(weight=term.weight * self.weights[name])
        return terms

    def attention(self, side: str, progress: float | None = None) -> list[int]:
        """The layers whose queries, keys and values are read: now, or (None) ever."""
        now = [m for m in self.methods.values() if progress is None or m.features(progress)]
        return sorted({layer for method in now for layer in method.attention(side)})

    def levels(self, side: str, progress: float | None = None) -> list[int]:
        """The levels of the hidden states that are read: now, or (None) ever."""
        now = [m for m in self.methods.values() if progress is None or m.features(progress)]
        return sorted({level for method in now for level in method.levels(side)})

    def predicts(self, side: str, progress: float | None = None) -> bool:
        """Whether predictions are read: now, or (None) ever. Stages change once, so that the ends of training tell."""
        return any(
            method.predicts(side, now) and (progress is not None or side == "student" or method.needs_teacher(now))
            for method in self.methods.values()
            for now in ((0.0, 1.0) if progress is None else (progress,))
        )

    def needs_teacher(self, progress: float) -> bool:
        return any(method.needs_teacher(progress) for method in self.methods.values())

    def one_shape(self) -> bool:
        return any(method.one_shape for method in self.methods.values())

    def check_unlabelled(self) -> None:
        """Raise where one of the methods reads labels, for a training set without any."""
        for name, method in self.methods.items():
            option = method.reads_labels()
            if option is not None:
                raise ValueError(
                    f"labels: {name} reads them, and the training set has none; give it a column 'labels' (fastkd distill: "
                    "label_column), or choose "
                    f"{name}:{option}, which learns from the teacher alone"
                )

    def check_packed(self) -> None:
        """Raise where one of the methods cannot take rows of several documents."""
        for name, method in self.methods.items():
            if not method.token_wise:
                known = ", ".join(other for other in METHODS if find(other).token_wise)
                raise ValueError(
                    f"pack: {name} compares the tokens of a row with each other, and a packed row holds several documents; "
                    f"leave --pack out, or choose {known}"
                )


def build(text: str, setup: Setup) -> Combined:
    """The methods that `text` names, checked against the models and the task."""
    if not isinstance(text, str):
        raise ValueError(
            f"method: a teacher was given, and method={text!r}; name one, for example method='kd', or pass teacher=None to "
            "fine-tune the student alone"
        )
    methods, weights = {}, {}
    for name, options in parse(text):
        kind = find(name)
        if setup.student.causal != setup.teacher.causal:
            raise ValueError(
                f"{name}: the attention of the teacher ({setup.teacher.family}) is {ATTENTION[setup.teacher.causal]} and that "
                f"of the student ({setup.student.family}) {ATTENTION[setup.student.causal]}, so their tokens see different "
                "contexts; choose two models of one kind"
            )
        why_not = refusal(name, setup.student.causal, setup.task)
        if why_not is not None:
            raise ValueError(f"method: {why_not}")
        weights[name] = options.pop("weight", 1.0)
        checks.number(f"{name}:weight", weights[name])
        unknown = sorted(set(options) - kind.options())
        if unknown:
            raise ValueError(
                f"method: {name} has no option {', '.join(unknown)}; it has weight, {', '.join(sorted(kind.options()))}"
            )
        methods[name] = kind(setup, **options)
    return Combined(methods, weights)
