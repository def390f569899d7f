"""All-pairs layer costs (BERT-EMD, TinyBERT, PKD): which implementation runs."""

from torch import Tensor

from fastkd import backends
from fastkd.reference import layer_cost as reference


def _first_tensor(layers) -> Tensor:
    return layers[0] if isinstance(layers[0], Tensor) else layers[0][0]


def layer_cost(students, teachers, mask, clamp, backend) -> Tensor:
    """[N, M] mean squared differences between layers."""
    backends.choose("layer_cost", backend, students[0])
    with backends.full_precision(students[0]):
        return reference.layer_cost(students, teachers, mask, clamp)


def attention_cost(students, teachers, mask, causal, scale, heads, backend) -> Tensor:
    """[N, M] mean squared differences between attention scores."""
    x = _first_tensor(students)
    backends.choose("layer_cost", backend, x)
    with backends.full_precision(x):
        return reference.attention_cost(students, teachers, mask, causal, scale, heads)
