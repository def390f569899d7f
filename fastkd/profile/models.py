"""Models to profile: real ones by name, or config-only ones without weights (random, which takes as long), and tokens."""

import copy
import difflib
from pathlib import Path

import torch
from torch.utils.data import StackDataset
from transformers import AutoConfig, AutoModel

from fastkd.train import states
from fastkd.train import student as students
from fastkd.train.methods import METHODS, find, parse, refusal

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
LLAMA = {"vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0, "num_key_value_heads": 8}
CONFIGS = {  # model type, and what differs from its defaults
    "bert-base": ("bert", {}),
    "bert-large": ("bert", LARGE),
    "roberta-large": ("roberta", {"vocab_size": 50265, "max_position_embeddings": 514, **LARGE}),
    "distilbert": ("distilbert", {}),
    "modernbert": ("modernbert", {}),
    "gpt2": ("gpt2", {}),
    "llama-1b": ("llama", {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192,
                           "tie_word_embeddings": True, **LLAMA}),
    "llama-8b": ("llama", {"intermediate_size": 14336, **LLAMA}),
    "qwen-0.5b": ("qwen2", {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                            "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True}),
    "smollm2-135m": ("llama", {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                               "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}),
}  # fmt: skip


def config_of(text: str):
    """ "bert-base", "bert-base:num_hidden_layers=4,hidden_size=128", or a folder or file with a config.json."""
    name, _, changes = text.partition(":")
    if name in CONFIGS:
        config = AutoConfig.for_model(CONFIGS[name][0], **CONFIGS[name][1])
    elif Path(name).exists():
        config = AutoConfig.from_pretrained(name)
    else:
        meant = "".join(f"did you mean {close}? " for close in difflib.get_close_matches(name, CONFIGS, 1))
        raise ValueError(f"from-config: there is no {name!r}; {meant}there are {', '.join(CONFIGS)}, or a config.json")
    try:
        if changes:
            config.update_from_string(changes)
    except (ValueError, TypeError) as error:
        wanted = f"{type(config).__name__} takes option=value of its own options, by comma"
        raise ValueError(f"from-config: {changes!r} is refused ({error}); {wanted}") from error
    return config


def config_for(name: str, from_config: bool):
    if from_config:
        return config_of(name)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = f"{name} is no model that can be had here ({str(error).strip().splitlines()[0]})"
        raise ValueError(f"teacher: {reason}; --from-config needs none") from error


def is_causal(config) -> bool:
    """Whether models of this configuration have causal attention, asked of one with a single layer."""
    config = copy.deepcopy(config)
    config.get_text_config().num_hidden_layers = 1
    try:
        with torch.device("meta"):  # mostly its modules say so
            return states.is_causal(AutoModel.from_config(config))
    except Exception:  # a forward is needed, or the options are wrong
        return states.is_causal(built(AutoModel, config))


def built(auto, config):
    try:
        return auto.from_config(config)
    except Exception as error:  # whatever an option makes of the model's code: a KeyError, a division by zero
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"from-config: no {config.model_type} can be built of these options: {reason}") from error


def task_for(method: str, causal: bool) -> str:
    """The task that this method is usually trained on, with models of causal or of bidirectional attention."""
    tasks = [METHODS[name].tasks for name, _ in parse(method) if name in METHODS]
    suiting = [task for task in _usual_tasks(causal) if all(task in allowed for allowed in tasks)]
    if not suiting:
        raise ValueError(f"method: {method} has no task that suits this model; choose --task")
    return suiting[0]


def _usual_tasks(causal: bool) -> tuple[str, str]:
    return ("causal_lm", "classification") if causal else ("classification", "masked_lm")


def sensible_methods(causal: bool) -> list[str]:
    return [name for name in METHODS if any(refusal(name, causal, task) is None for task in _usual_tasks(causal))]


def first_stage(method: str) -> str:
    """A method of two stages is profiled in the first, which is the one that distils."""
    spelled = []
    for name, options in parse(method):
        first = {"share": 1.0} if len(find(name).stages) > 1 else {}
        given = ",".join(f"{key}={value}" for key, value in {**first, **options}.items())
        spelled.append(f"{name}:{given}".rstrip(":"))
    return " + ".join(spelled)


def pair(name: str, from_config: bool, layers: str, task: str, seed: int = 0):
    """Teacher and student; the student keeps some of the teacher's layers."""
    torch.manual_seed(seed)
    auto = students.AUTO[task]
    teacher = built(auto, config_of(name)) if from_config else auto.from_pretrained(name)
    if getattr(teacher.config, "pad_token_id", None) is None:
        teacher.config.pad_token_id = teacher.config.get_text_config().eos_token_id or 0
    return teacher, students.from_layers(teacher, layers)


def tokens(config, task: str, batch: int, length: int, seed: int = 0) -> StackDataset:
    """Random ids, no padding: every step has batch × length tokens."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or length
    if config.model_type == "roberta":
        limit -= 2  # its positions begin after the padding index
    if length > limit:
        raise ValueError(f"length: {config.model_type} has {limit} positions, so {length} tokens do not fit")
    rows = max(8 * batch, 512)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(min(5, text.vocab_size - 1), text.vocab_size, (rows, length), generator=generator)
    columns = {"input_ids": ids.tolist(), "attention_mask": [[1] * length] * rows, "example_id": list(range(rows))}
    if task == "classification":
        return StackDataset(**columns, labels=[i % 2 for i in range(rows)])
    if task == "masked_lm":
        ids[:, torch.arange(length) % 7 != 3] = -100
    return StackDataset(**columns, labels=ids.tolist())
