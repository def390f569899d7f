"""The student: some of the teacher's layers, or a smaller configuration, or a checkpoint of its own."""

import copy
import json
import re
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .states import depth, layer_list

# The kind of model that a task is trained with.
AUTO = {
    "classification": AutoModelForSequenceClassification,
    "multi_label": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "embedding": AutoModel,
    "masked_lm": AutoModelForMaskedLM,
    "cloze": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
}


def parse_layers(text: str, layers: int) -> list[int]:
    """ "0,2,4" or "every:2" (0, 2, 4, …), counted from 0 and checked against the teacher's depth."""
    text = text.strip()
    every = re.fullmatch(r"every:(\d+)", text)
    if every:
        step = int(every[1])
        if not 1 <= step <= layers:
            raise ValueError(
                f"student_layers: every:{step} of a teacher of {layers} layers leaves none; use 1 to {layers}"
            )
        return list(range(0, layers, step))
    if not re.fullmatch(r"\d+(\s*,\s*\d+)*", text):
        raise ValueError(f"student_layers: expected numbers as in 0,2,4 or every:2, got {text!r}")
    chosen = [int(x) for x in text.split(",")]
    outside = [x for x in chosen if x >= layers]
    if outside:
        raise ValueError(
            f"student_layers: asks for a student of {len(chosen)} layers from {chosen}, but the teacher has {layers} "
            f"layers, 0 to {layers - 1}; {', '.join(map(str, outside))} is out of range"
        )
    return chosen


@torch.no_grad()
def from_layers(teacher: nn.Module, layers: str | list[int]) -> nn.Module:
    """A model of the teacher's kind and width with these of its layers, and all else (embeddings, head) copied."""
    chosen = parse_layers(layers, depth(teacher)) if isinstance(layers, str) else list(layers)
    config = copy.deepcopy(teacher.config)
    text = config.get_text_config()
    for key, value in vars(text).items():  # what each layer is, one after another: layer_types, no_rope_layers
        if "layer" in key and isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, key, [value[i] for i in chosen])
    text.num_hidden_layers = len(chosen)
    config._attn_implementation = "sdpa" if config._attn_implementation == "fastkd" else config._attn_implementation
    student = type(teacher)(config)
    weights, given = {}, teacher.state_dict()
    shared = len(chosen) < depth(teacher) and student.state_dict().keys() == given.keys()  # as in ALBERT
    name = None if shared else layer_list(teacher)
    for key, value in given.items():
        found = name and re.match(rf"{re.escape(name)}\.(\d+)\.", key)
        if not found:
            weights[key] = value
        else:  # a layer may be taken more than once
            rest = key[found.end() :]
            weights.update({f"{name}.{new}.{rest}": value for new, old in enumerate(chosen) if old == int(found[1])})
    differing = student.load_state_dict(weights, strict=False)
    if differing.missing_keys or differing.unexpected_keys:
        raise ValueError(
            f"student_layers: layers of a {type(teacher).__name__} are not all built alike ("
            f"{', '.join((*differing.missing_keys, *differing.unexpected_keys))} fit nowhere); keep layer 0 in its place"
        )
    return student.to(teacher.dtype).train()


@torch.no_grad()
def origins(student: nn.Module, teacher: nn.Module) -> list[int] | None:
    """The teacher's layers, counted from 0, as which the student's begin; None where they are not the teacher's."""
    try:
        mine, its = (  # a row of each layer is enough to know it by
            [next(p[0] for p in layer.parameters() if p.ndim > 1) for layer in model.get_submodule(layer_list(model))]
            for model in (student, teacher)
        )
    except (ValueError, StopIteration):  # no list of layers, as in ALBERT
        return None
    same = lambda one, other: one.shape == other.shape and torch.equal(one, other.to(one))  # noqa: E731
    found = [next((i for i, row in enumerate(its) if same(own, row)), None) for own in mine]
    return None if None in found else found


def from_config(teacher: nn.Module, changes: str | dict) -> nn.Module:
    """The teacher's kind with a changed configuration ("hidden_size=192,num_hidden_layers=3", a dict, or a JSON file),
    from random weights."""
    if isinstance(changes, str):
        changes = _read_changes(changes)
    config = copy.deepcopy(teacher.config)
    text = config.get_text_config()
    unknown = [key for key in changes if not hasattr(text, key)]
    if unknown:
        raise ValueError(f"student_config: {type(text).__name__} has no {', '.join(unknown)}")
    for key, value in changes.items():
        setattr(text, key, value)
    for key, value in vars(text).items():
        if "layer" in key and isinstance(value, list) and len(value) == depth(teacher):
            setattr(text, key, (value * text.num_hidden_layers)[: text.num_hidden_layers])
    if text.hidden_size % text.num_attention_heads:
        raise ValueError(
            f"student_config: hidden_size={text.hidden_size} must be a multiple of num_attention_heads="
            f"{text.num_attention_heads}"
        )
    return type(teacher)(config).train()


def _read_changes(text: str) -> dict:
    if text.endswith(".json"):
        return json.loads(Path(text).read_text())
    try:
        pairs = dict(part.split("=", 1) for part in text.split(","))
        return {key.strip(): json.loads(value) for key, value in pairs.items()}
    except ValueError as error:
        raise ValueError(f"student_config: expected name=number,… or a .json file, got {text!r}") from error
