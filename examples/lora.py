"""A student of which only LoRA adapters train: a causal language model learns from a larger one. Needs `pip install peft`.

    python examples/lora.py --teacher Qwen/Qwen2.5-1.5B --student Qwen/Qwen2.5-0.5B --texts corpus.txt --output runs/lora

The divergence still comes from hidden states and heads, unless the adapter is on the head itself.
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

try:
    from peft import LoraConfig, get_peft_model
except ImportError:
    raise SystemExit("examples/lora.py: peft is not installed; pip install peft") from None

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--teacher", required=True)
parser.add_argument("--student", required=True, help="a model with the teacher's tokenizer")
parser.add_argument("--texts", required=True, help="a file with one document per line")
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--target_modules", default="all-linear", help="'all-linear', or names joined by commas")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--output", required=True)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.teacher)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
teacher, student = (
    AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (options.teacher, options.student)
)
modules = options.target_modules if options.target_modules == "all-linear" else options.target_modules.split(",")
student = get_peft_model(student, LoraConfig(r=options.rank, target_modules=modules, task_type="CAUSAL_LM"))

data = load_dataset("text", data_files=options.texts, split="train").filter(lambda row: row["text"].strip())
data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns="text")
arguments = TrainingArguments(
    options.output, max_steps=options.steps, learning_rate=2e-4, per_device_train_batch_size=8, report_to="none"
)
trainer = fastkd.DistillTrainer(
    student, teacher, "skew_kl", task="causal_lm", args=arguments, train_dataset=data, processing_class=tokenizer,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)  # fmt: skip
trainer.train()
student.save_pretrained(f"{options.output}/adapter")  # the adapter alone
