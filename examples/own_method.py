"""A method of your own in `DistillTrainer`: the student's sentence vectors take the direction of the teacher's.

    python examples/own_method.py --teacher my/fine-tuned-bert --train train.csv --output runs/own

An installed package registers its methods by an entry point of the group `fastkd.methods` instead, which the command line
finds too: [project.entry-points."fastkd.methods"] direction = "my_package:Direction".
"""

import argparse

import torch
from datasets import load_dataset
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

import fastkd
from fastkd.train.methods import Method, Term, register
from fastkd.train.student import from_layers


@register("direction")
class Direction(Method):
    hidden = True  # reads hidden states

    def __init__(self, setup, trained: bool = True):  # an option: "direction:trained=False"
        super().__init__(setup)
        self.projection = torch.nn.Linear(setup.student.width, setup.teacher.width) if trained else torch.nn.Identity()

    def forward(self, batch):
        weights = batch.mask[..., None] / batch.mask.sum(1)[:, None, None]  # [B, S, 1], of the mean over real tokens
        student, teacher = ((side.hidden[-1] * weights).sum(1) for side in (batch.student, batch.teacher))
        distance = 1 - cosine_similarity(self.projection(student), teacher, dim=-1)  # [B]
        return {"cosine": Term(distance.mean(), 1.0, "examples")}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--teacher", required=True)
parser.add_argument("--train", required=True, help="a CSV file with the columns text and label, numbered from 0")
parser.add_argument("--method", default="direction + kd:temperature=2")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--output", required=True)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.teacher)
teacher = AutoModelForSequenceClassification.from_pretrained(options.teacher)
data = load_dataset("csv", data_files=options.train, split="train").rename_column("label", "labels")
data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128), remove_columns="text")
arguments = TrainingArguments(options.output, num_train_epochs=options.epochs, logging_steps=1, report_to="none")
trainer = fastkd.DistillTrainer(
    from_layers(teacher, "every:2"),
    teacher,
    options.method,
    args=arguments,
    train_dataset=data,
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model(f"{options.output}/student")
