"""TRL's on-policy DistillationTrainer with fastkd's loss: a `with` block around the script that you have. Needs trl 1.16.

    python examples/trl_patch.py --teacher Qwen/Qwen2.5-1.5B-Instruct --student Qwen/Qwen2.5-0.5B-Instruct \
        --prompts prompts.jsonl --output runs/trl

`fastkd.patch` says what it replaced, refuses versions of TRL that it was not tested with, and is undone at the end of the
block. What fastkd's kernels do not cover is computed by TRL.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastkd

try:
    from trl import DistillationConfig, DistillationTrainer
except ImportError:
    raise SystemExit("examples/trl_patch.py: trl is not installed; pip install trl==1.16.0") from None

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--teacher", required=True)
parser.add_argument("--student", required=True, help="a model with the teacher's tokenizer")
parser.add_argument("--prompts", required=True, help="a .jsonl file with the column prompt")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--max_completion_length", type=int, default=256)
parser.add_argument("--output", required=True)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.student, padding_side="left")
teacher, student = (AutoModelForCausalLM.from_pretrained(name) for name in (options.teacher, options.student))
arguments = DistillationConfig(
    options.output,
    beta=0.5,  # the generalised Jensen-Shannon divergence; 0 is forward KL, 1 reverse KL
    max_steps=options.steps,
    max_completion_length=options.max_completion_length,
    per_device_train_batch_size=4,
    bf16=torch.cuda.is_available(),  # TRL's default, which a CPU refuses
    report_to="none",
)
with fastkd.patch("trl") as patched:
    print(patched)
    trainer = DistillationTrainer(
        student,
        teacher,
        args=arguments,
        train_dataset=load_dataset("json", data_files=options.prompts, split="train"),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(f"{options.output}/student")
