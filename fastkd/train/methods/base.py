"""What a method is: what it reads of the two models, and which terms it makes of it."""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import torch
from torch import Tensor, nn

from fastkd.losses.kd import PredictionLoss
from fastkd.train.batch import Batch, Term
from fastkd.train.states import QKV, is_causal

logger = logging.getLogger(__name__)
_OURS = ("setup", "causal", "process_group", "backend")  # arguments that are no options of a method


@dataclass(frozen=True)
class Side:
    """What a method may know of a model before training."""

    family: str
    layers: int
    width: int
    heads: int
    key_heads: int
    causal: bool = False
    head_width: int | None = None  # None: width / heads

    @classmethod
    def of(cls, model) -> "Side":
        return cls.of_config(model.config, is_causal(model))

    @classmethod
    def of_config(cls, config, causal: bool) -> "Side":
        config = config.get_text_config()
        heads = getattr(config, "num_attention_heads", 0)  # 0: it has no attention
        groups = getattr(config, "num_key_value_heads", None) or heads
        sizes = config.num_hidden_layers, config.hidden_size, heads, groups
        return cls(config.model_type, *sizes, causal, getattr(config, "head_dim", None))


@dataclass(frozen=True)
class Setup:
    """What a method may know before training. data: the training set, with a length or without one. process_group: the ranks
    that train together, None for one; losses that couple the examples of a batch take it. origins: the teacher's layers,
    counted from 0, as which the student's begin; None where they are not the teacher's, or it is not known."""

    student: Side
    teacher: Side
    task: str
    data: Sequence | None = None
    process_group: object | None = None
    origins: list[int] | None = None

    @property
    def n_data(self) -> int:
        """The number of training examples; 0 where the training set does not say."""
        return len(self.data) if hasattr(self.data, "__len__") else 0

    @cached_property
    def labels(self) -> Tensor | None:
        """[n_data], the classes of the training set; None where the task has none, or the examples do not bear them."""
        if self.task != "classification" or not self.n_data:
            return None
        name = next((name for name in ("labels", "label") if name in self.data[0]), None)
        if name is None:
            return None
        whole = name in getattr(self.data, "column_names", ())
        return torch.as_tensor(self.data[name][:] if whole else [self.data[i][name] for i in range(self.n_data)])


class Method(nn.Module):
    """A method is a module: what it learns is in its parameters and buffers, which are saved for resuming and never
    become part of the student. Subclasses set what they read, and return their terms from `forward`. Where `Loss` is set,
    the keyword arguments of that loss are options of the method too, and reach its __init__ as **options.

    stages: a method that learns features first and the task afterwards has two; `share` is the first one's part of
    training. Combined with other methods there is one stage, and the task is the others' business.

    Args:
        share: The first stage's part of training, in [0, 1]; with 1 it is all.
    """

    Loss: type[nn.Module] | None = None
    hidden = False  # reads hidden states
    read: dict[str, Sequence[int]] | None = None  # which levels of them, of "student" and "teacher"; None: all
    features_only = False  # its first stage reads no predictions
    every_layer = False  # reads the queries, keys and values of all layers
    one_shape = False  # needs batches of one shape on all ranks: it couples their examples, or counts padding
    every_position = False  # reads predictions wherever a token is real, label or not
    reads_padding = False  # compares attention scores, whose queries at padding count, too
    token_wise = False  # compares no token with another one, so that a row may hold several documents
    soft_only = "alpha=1"  # the option with which the prediction's loss reads no labels
    stages: tuple[str, ...] = ("all",)

    def __init__(self, setup: Setup, share: float = 1.0):
        super().__init__()
        if not isinstance(share, Real) or not 0 <= share <= 1:
            raise ValueError(f"share: the first stage's part of training must lie in [0, 1], got {share!r}")
        self.setup, self.share, self.alone = setup, share, True
        if setup.task == "embedding":  # which has no labels for a second stage
            self.stages = self.stages[:1]
        self.seen: list[tuple[Tensor, ...]] = []

    @classmethod
    def options(cls) -> set[str]:
        """The names of this method's options."""
        own = list(inspect.signature(cls).parameters.values())
        of_loss = [] if cls.Loss is None else inspect.signature(cls.Loss).parameters.values()
        own += [p for p in of_loss if p.kind is p.KEYWORD_ONLY]
        return {p.name for p in own if p.kind is not p.VAR_KEYWORD and p.name not in _OURS}

    def attention(self, side: str) -> Sequence[int]:
        """The layers (0-based) of the "student" or the "teacher" whose queries, keys and values are read."""
        return range(getattr(self.setup, side).layers) if self.every_layer else ()

    def levels(self, side: str) -> Sequence[int]:
        """The levels of the hidden states of the "student" or the "teacher" that are read; level 0 is the embeddings."""
        every = range(getattr(self.setup, side).layers + 1) if self.hidden else ()
        return every if self.read is None else self.read[side]

    def forward(self, batch: Batch) -> dict[str, Term]:
        raise NotImplementedError

    def stage(self, progress: float) -> str:
        if len(self.stages) == 1 or not self.alone:
            return self.stages[0]
        return self.stages[0] if progress < self.share or self.share == 1 else self.stages[1]

    def features(self, progress: float) -> bool:
        """Whether hidden states and attention are read now; a second stage has no use for them."""
        return self.stage(progress) == self.stages[0]

    def predicts(self, side: str, progress: float) -> bool:
        """Whether predictions of the "student" or the "teacher" are read now; where none are, no head runs."""
        return not (self.features_only and self.features(progress))

    def reads_labels(self) -> str | None:
        """The option with which the method would read no labels; None where it reads none."""
        if self.stage(1.0) == "task":
            return "share=1"
        hard = any(isinstance(loss, PredictionLoss) and loss.hard for loss in self.modules())
        return self.soft_only if hard else None

    def needs_teacher(self, progress: float) -> bool:
        """Whether the teacher is needed now; plain fine-tuning has no use for it."""
        return self.stage(progress) != "task"

    def once_per_step(self, batch: Batch, *inputs: Tensor) -> Tensor:
        """self.loss(*inputs), whose learned state moves once per step, with the rows of all of its micro-batches."""
        whole_step = batch.advance and not self.seen
        value = self.loss.train(self.training and whole_step)(*inputs)
        if self.training and not whole_step:
            self.seen.append(tuple(x.detach() for x in inputs))
            if batch.advance:
                parts = [len(x[0]) for x in self.seen]
                self.loss.train()(*map(torch.cat, zip(*self.seen, strict=True)), parts=parts)
                self.seen.clear()
        return value

    def recorded(self, batch: Batch, side: str) -> list[QKV]:
        """The layers that `attention` names, as the model has them."""
        layers = getattr(batch, side).qkv
        return [layers[layer] for layer in self.attention(side)]

    def qkv(self, batch: Batch, side: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The same with the queries rescaled, so that q·kᵀ/√d are the model's own scores."""
        return [layer.normalized() for layer in self.recorded(batch, side)]

    def scores(self, batch: Batch) -> list[list[tuple[Tensor, Tensor]]]:
        """The same without the values, of both models."""
        return [[(q, k) for q, k, _ in self.qkv(batch, side)] for side in ("student", "teacher")]


def uniform_map(setup: Setup, name: str) -> list[tuple[int, int]]:
    """Student layer l learns from teacher layer l·M/N (1-based, so that they are levels of the hidden states)."""
    n, m = setup.student.layers, setup.teacher.layers
    if m < n or m % n:
        raise ValueError(
            f"{name}: the uniform map needs a multiple of the student's layers in the teacher, got {n} and {m}; "
            "choose --student-layers so, or another method"
        )
    return [(i, i * (m // n)) for i in range(1, n + 1)]


def advise_layers(setup: Setup, name: str, pairs: list[tuple[int, int]]) -> None:
    """A warning where layers of an encoder begin as other layers of the teacher than those they learn from, of `pairs` (student,
    teacher), counted from 1. A decoder is worse off without the teacher's first layer (docs/recipes.md)."""
    if setup.origins is None or setup.student.causal:
        return
    own, learn = ([layer - 1 for layer in side] for side in zip(*pairs, strict=True))
    begin = [setup.origins[layer] for layer in own]
    if begin == learn:
        return
    each = setup.teacher.layers // setup.student.layers
    better = [each * layer - 1 for layer in range(1, setup.student.layers + 1)]
    fits = [better[layer] for layer in own] == learn
    own, begin, learn, better = (",".join(map(str, layers)) for layers in (own, begin, learn, better))
    logger.warning(
        f"{name}: the student's layers {own} learn from the teacher's layers {learn}, but begin as its layers {begin} (counted "
        "from 0). Students that begin as what they learn from were better on SST-2; choose --student_layers "
        f"{better if fits else 'so'}"
    )


def inner_layers(setup: Setup, name: str) -> None:
    if setup.student.layers < 2:
        raise ValueError(
            f"{name}: compares inner layers, so the student needs two at least, got {setup.student.layers}"
        )


def layer_number(name: str, layer: int | None, layers: int) -> int:
    """`layer` (1-based) of the teacher, the last where it is None."""
    if layer is not None and not 1 <= layer <= layers:
        raise ValueError(f"{name}: teacher_layer={layer} is not among the teacher's layers 1 to {layers}")
    return layers if layer is None else layer


def has_numbers(setup: Setup, name: str) -> None:
    if not setup.n_data:
        raise ValueError(
            f"train_dataset: {name} keeps a vector of every example, so it needs a data set with a length, got "
            f"{type(setup.data).__name__}"
        )


def has_labels(setup: Setup, name: str, needed: bool) -> bool:
    if needed and setup.labels is None:
        raise ValueError(
            f"{name}: negatives=label needs labels, and the training set of the task {setup.task} has none; choose "
            "negatives=in_batch"
        )
    return setup.labels is not None


def same_width(setup: Setup, name: str) -> None:
    if setup.student.width != setup.teacher.width:
        raise ValueError(
            f"{name}: compares hidden states as they are, so both widths must agree, got {setup.student.width} (student) "
            f"and {setup.teacher.width} (teacher); make the student with --student-layers, or choose fcd or minilmv2"
        )


def same_heads(setup: Setup, name: str, heads: str | None = None) -> None:
    if heads is None and setup.student.heads != setup.teacher.heads:
        raise ValueError(
            f"{name}: compares attention head by head, but the student has {setup.student.heads} heads and the teacher "
            f"{setup.teacher.heads}; choose minilmv2, which re-splits them" + (
                "" if name == "minilm" else f", or {name}:heads=mean, which averages the scores over the heads"
            )
        )  # fmt: skip


def same_relation_heads(setup: Setup, name: str, relation_heads: int) -> None:
    for side in ("student", "teacher"):
        model = getattr(setup, side)
        size = model.head_width or model.width // max(model.heads, 1)
        for what, width in (("query", size * model.heads), ("key", size * model.key_heads)):
            if width % relation_heads:
                raise ValueError(
                    f"{name}: relation_heads={relation_heads} does not divide the {side}'s {what} width {width}; "
                    f"pass a divisor of both models' widths, as {name}:relation_heads=…"
                )
