"""Tiny models made from configurations alone, one per family, and a padded batch for them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch
from datasets import Dataset
from transformers import AutoConfig, TrainingArguments

from fastkd.train.student import AUTO

VOCAB, LENGTH = 60, 10
FAMILIES = ("bert", "roberta", "distilbert", "gpt2", "llama")
MORE_FAMILIES = (*FAMILIES, "modernbert", "qwen2")
MORE_DECODERS = ("mistral", "qwen3", "gemma3_text", "phi3", "smollm3", "opt")
DECODERS = ("gpt2", "llama", "qwen2", *MORE_DECODERS)
OWN_ATTENTION = ("deberta-v2", "mpnet")  # not through transformers' attention interface
MORE_ENCODERS = ("electra", "albert", "xlm-roberta", *OWN_ATTENTION)


def config(family: str, layers: int = 4, width: int = 16, heads: int = 4, **extra):
    common = {"vocab_size": VOCAB, "pad_token_id": 1, **extra}
    ends = {"bos_token_id": 0, "eos_token_id": 2}
    sizes = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 2 * width,
        "max_position_embeddings": 32,
    }  # fmt: skip
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    gpt2 = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 32}
    still = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    distil = {
        "dim": width,
        "n_layers": layers,
        "n_heads": heads,
        "hidden_dim": 2 * width,
        "max_position_embeddings": 32,
    }
    modern = {"global_attn_every_n_layers": 2, "local_attention": 4, "cls_token_id": 0, "sep_token_id": 2}
    grouped = {**sizes, "num_key_value_heads": heads // 2, "head_dim": width // heads, **common, **ends}
    kinds = {
        "bert": {**sizes, **calm, **common},
        "roberta": {**sizes, **calm, **common, **ends, "max_position_embeddings": 34},
        "distilbert": {
            **distil, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, **common,
        },
        "gpt2": {**gpt2, **still, **common, **ends},
        "llama": {**sizes, "num_key_value_heads": heads // 2, **common, **ends},
        "qwen2": {**sizes, "num_key_value_heads": heads // 2, **common, **ends},
        "modernbert": {**sizes, **modern, **common, **ends},
        "mistral": {**grouped, "sliding_window": None},
        "qwen3": {**grouped, "head_dim": width},  # wider than width / heads, as in Qwen3 itself
        "gemma3_text": {**grouped, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * (layers // 2)},
        "phi3": grouped,
        "smollm3": {**grouped, "no_rope_layer_interval": 2},
        "opt": {**sizes, "ffn_dim": 2 * width, "word_embed_proj_dim": width, **common, **ends},
        "electra": {**sizes, **calm, "embedding_size": width // 2, **common},
        "albert": {**sizes, **calm, "embedding_size": width // 2, **common, **ends},
        "xlm-roberta": {**sizes, **calm, **common, **ends, "max_position_embeddings": 34},
        "deberta-v2": {**sizes, **calm, **common, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "mpnet": {**sizes, **calm, **common, **ends, "max_position_embeddings": 34},
    }  # fmt: skip
    return AutoConfig.for_model(family, **kinds[family])


def model(family: str, task: str = "classification", *, seed: int = 0, dropout: float = 0.0, **sizes):
    torch.manual_seed(seed)
    if task == "regression":
        sizes["num_labels"] = 1
    made = AUTO[task].from_config(config(family, **sizes))
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return made


def padded(rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded ids of different lengths; 1 is the padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (rows, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, LENGTH - row % 3 * 3 :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def dataset(task: str, rows: int = 8, *, seed: int = 0, even: bool = False) -> Dataset:
    """even=True: no padding, so that every micro-batch has equally many tokens."""
    batch = padded(rows, seed)
    if even:
        batch["input_ids"] = torch.randint(5, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    ids = batch["input_ids"]
    columns = {name: x.tolist() for name, x in batch.items()}
    columns["example_id"] = list(range(rows))
    if task in ("classification", "cloze"):
        columns["labels"] = [i % 2 for i in range(rows)]
    if task == "cloze":
        columns["blank"] = [2] * rows
    if task == "regression":
        columns["labels"] = [float(i % 5) / 4 for i in range(rows)]
    if task == "multi_label":
        columns["labels"] = [[i % 2, int(i % 3 == 0)] for i in range(rows)]
    if task == "token_classification":  # on the first of the tokens of each word
        inner = (batch["attention_mask"] == 0) | (torch.arange(LENGTH) % 3 == 1)
        columns["labels"] = (ids % 2).masked_fill(inner, -100).tolist()
    if task in ("causal_lm", "masked_lm"):
        labels = ids.masked_fill(batch["attention_mask"] == 0, -100)
        if task == "masked_lm":
            hidden = torch.arange(LENGTH) % 4 != 1
            labels = labels.masked_fill(hidden, -100)
        columns["labels"] = labels.tolist()
    return Dataset.from_dict(columns)


def arguments(folder, **changes) -> TrainingArguments:
    options = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 1e-3,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1,
        "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "weight_decay": 0.0, "seed": 1,
    }  # fmt: skip
    return TrainingArguments(**{**options, **changes})
