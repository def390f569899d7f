"""A text classifier, distilled on the rows of a CSV file with the columns text and label.

    python examples/classification_csv.py --teacher my/fine-tuned-bert --train train.csv --validation dev.csv --output runs/csv

The labels are the teacher's names of its outputs (`id2label` in its config.json). `fastkd distill` does the same with a
report, a model card and checks of the data.
"""

import argparse

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

import fastkd
from fastkd.train import metrics
from fastkd.train.student import from_layers

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--teacher", required=True)
parser.add_argument("--train", required=True)
parser.add_argument("--validation", required=True)
parser.add_argument("--student_layers", default="every:2")
parser.add_argument("--method", default="bert_emd:beta=0.005 + kd:alpha=0.9,temperature=2")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--output", required=True)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.teacher)
teacher = AutoModelForSequenceClassification.from_pretrained(options.teacher)
student = from_layers(teacher, options.student_layers)


def encode(rows):
    return tokenizer(rows["text"], truncation=True, max_length=128) | {
        "labels": [teacher.config.label2id[label] for label in rows["label"]]
    }


data = load_dataset("csv", data_files={"train": options.train, "validation": options.validation})
data = data.map(encode, batched=True, remove_columns=data["train"].column_names)
arguments = TrainingArguments(
    options.output,
    num_train_epochs=options.epochs,
    learning_rate=2e-5,
    per_device_train_batch_size=32,
    eval_strategy="epoch",
    report_to="none",
)
trainer = fastkd.DistillTrainer(
    student, teacher, options.method, args=arguments, processing_class=tokenizer,
    train_dataset=data["train"], eval_dataset=data["validation"], compute_metrics=metrics.of_task("classification"),
)  # fmt: skip
trainer.train()
trainer.save_model(f"{options.output}/student")
print(f"teacher: {trainer.evaluate_other(teacher)['eval_accuracy']:.1%}")
print(f"student: {trainer.evaluate()['eval_accuracy']:.1%}")
