"""A masked language model with a smaller vocabulary: the teacher with half of its tokens, trained by GLMD.

    python examples/smaller_vocabulary.py --teacher bert-base-multilingual-cased --texts corpus.txt --output runs/small

The tokens that are frequent in the texts are kept; `fastkd vocab` does the same with a report of what they cover.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)

import fastkd
from fastkd.vocab.coverage import count_corpus
from fastkd.vocab.tokenizer import count_parts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--teacher", required=True)
parser.add_argument("--texts", required=True, help="a file with one text per line")
parser.add_argument("--size", type=float, default=0.5, help="the fraction of the tokens that is kept")
parser.add_argument("--steps", type=int, default=10_000)
parser.add_argument("--output", required=True)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.teacher)
teacher = AutoModelForMaskedLM.from_pretrained(options.teacher)
texts = [line for line in Path(options.texts).read_text().splitlines() if line.strip()]

counts = count_parts(count_corpus(texts, tokenizer), tokenizer)  # of tokens, and of the pieces that spell dropped ones
letters = [i for token, i in tokenizer.get_vocab().items() if len(token.removeprefix("##")) == 1]
vocab = fastkd.VocabMap.from_counts(counts, options.size, always_keep={*letters, *tokenizer.all_special_ids})
student, small_tokenizer = vocab.shrink(teacher), vocab.shrink_tokenizer(tokenizer)
print(
    f"{len(vocab)} of {vocab.original_size} tokens; {student.num_parameters() / teacher.num_parameters():.0%} parameters"
)

data = Dataset.from_dict({"text": texts})
data = data.map(lambda row: small_tokenizer(row["text"], truncation=True, max_length=128), remove_columns="text")
arguments = TrainingArguments(
    options.output, max_steps=options.steps, learning_rate=5e-5, per_device_train_batch_size=32, report_to="none"
)
trainer = fastkd.DistillTrainer(
    student, teacher, "glmd", task="masked_lm", teacher_tokens=vocab.kept_ids, args=arguments, train_dataset=data,
    processing_class=small_tokenizer, data_collator=DataCollatorForLanguageModeling(small_tokenizer),
)  # fmt: skip
trainer.train()
trainer.save_model(f"{options.output}/student")
vocab.save(f"{options.output}/student")
