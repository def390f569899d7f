"""A causal language model, distilled on the lines of a text file by the KL of the next token's distribution.

    python examples/causal_lm.py --teacher Qwen/Qwen2.5-0.5B --texts corpus.txt --output runs/lm

The divergence is computed from hidden states and heads, so that the logits of neither model are in memory. Other methods:
--method "jsd:beta=0.5", "skew_kl", "reverse_kl", "fcd + forward_kl:weight=0.5"; `fastkd methods` lists them.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)

import fastkd
from fastkd.train.student import from_layers

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--teacher", required=True)
parser.add_argument("--texts", required=True, help="a file with one document per line")
parser.add_argument("--student_layers", default="every:2")
parser.add_argument("--method", default="forward_kl")
parser.add_argument("--steps", type=int, default=10_000)
parser.add_argument("--output", required=True)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.teacher)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32)
student = from_layers(teacher, options.student_layers)

data = load_dataset("text", data_files=options.texts, split="train").filter(lambda row: row["text"].strip())
data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns="text")
arguments = TrainingArguments(
    options.output,
    max_steps=options.steps,
    learning_rate=1e-4,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=4,
    train_sampling_strategy="group_by_length",
    report_to="none",
)
trainer = fastkd.DistillTrainer(
    student, teacher, options.method, task="causal_lm", args=arguments, train_dataset=data, processing_class=tokenizer,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)  # fmt: skip
trainer.train()
trainer.save_model(f"{options.output}/student")
