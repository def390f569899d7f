"""What a method is: what it reads of the two models, and which terms it makes of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from fastkd.train.batch import Batch
from fastkd.train.states import QKV

DECODERS = ("gpt2", "llama", "qwen2")


class Term(NamedTuple):
    value: Tensor
    weight: float


@dataclass(frozen=True)
class Side:
    """What a method may know of a model before training."""

    family: str
    layers: int
    width: int
    heads: int
    key_heads: int
    causal: bool = False

    @classmethod
    def of(cls, model) -> "Side":
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        causal = any(getattr(module, "is_causal", False) for module in model.modules())  # its attention says so
        return cls(config.model_type, config.num_hidden_layers, config.hidden_size, heads, groups, causal)


@dataclass(frozen=True)
class Setup:
    """labels [n_data]: the classes of the training set, where the task has classes."""

    student: Side
    teacher: Side
    task: str
    n_data: int
    labels: Tensor | None = None


class Method(nn.Module):
    """A method is a module: what it learns is in its parameters and buffers, which are saved for resuming and never
    become part of the student. Subclasses set what they read, and return their terms from `forward`.

    stages: a method that learns features first and the task afterwards has two; `share` is the first one's part of
    training. Combined with other methods there is one stage, and the task is the others' business.
    """

    hidden = False  # reads hidden states
    stages: tuple[str, ...] = ("all",)

    def __init__(self, setup: Setup, share: float = 1.0):
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"share: the first stage's part of training must lie in [0, 1], got {share!r}")
        self.setup, self.share, self.alone = setup, share, True

    def attention(self, side: str) -> Sequence[int]:
        """The layers (0-based) of the "student" or the "teacher" whose queries, keys and values are read."""
        return ()

    def forward(self, batch: Batch) -> dict[str, Term]:
        raise NotImplementedError

    def stage(self, progress: float) -> str:
        if len(self.stages) == 1 or not self.alone:
            return self.stages[0]
        return self.stages[0] if progress < self.share or self.share == 1 else self.stages[1]

    def features(self, progress: float) -> bool:
        """Whether hidden states and attention are read now; a second stage has no use for them."""
        return self.stage(progress) == self.stages[0]

    def teaches(self, progress: float) -> bool:
        """Whether the teacher is needed now; plain fine-tuning has no use for it."""
        return self.stage(progress) != "task"

    def recorded(self, batch: Batch, side: str) -> list[QKV]:
        """The layers that `attention` names, as the model has them."""
        layers = getattr(batch, side).qkv
        return [layers[layer] for layer in self.attention(side)]

    def qkv(self, batch: Batch, side: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The same with the queries rescaled, so that q·kᵀ/√d are the model's own scores."""
        return [layer.normalized() for layer in self.recorded(batch, side)]


def uniform_map(setup: Setup, name: str) -> list[tuple[int, int]]:
    """Student layer l learns from teacher layer l·M/N (1-based, so that they are levels of the hidden states)."""
    n, m = setup.student.layers, setup.teacher.layers
    if m < n or m % n:
        raise ValueError(
            f"{name}: the uniform map needs a multiple of the student's layers in the teacher, got {n} and {m}; "
            "choose --student-layers so, or another method"
        )
    return [(i, i * (m // n)) for i in range(1, n + 1)]


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
