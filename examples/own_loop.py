"""A training loop of your own: attention relations (MiniLMv2) and token similarities (FCD), without labels.

    python examples/own_loop.py --teacher bert-base-uncased --texts corpus.txt --student_layers 0,3,6,9 --output student

`record_attention` makes a model keep the queries, keys and values of its layers while SDPA stays on, and `read` runs a
forward and returns what was asked for of it.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import fastkd
from fastkd.train.states import depth, forget_attention, read, record_attention
from fastkd.train.student import from_layers

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--teacher", required=True)
parser.add_argument("--texts", required=True, help="a file with one text per line")
parser.add_argument("--student_layers", default="every:2")
parser.add_argument("--output", required=True)
parser.add_argument("--steps", type=int, default=10_000)
parser.add_argument("--batch_size", type=int, default=32)
parser.add_argument("--relation_heads", type=int, default=48)
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(options.teacher)
teacher = AutoModel.from_pretrained(options.teacher).to(device).eval()
student = from_layers(teacher, options.student_layers).to(device)
for model in (teacher, student):
    record_attention(model)

relations, similarities = fastkd.MiniLMv2Loss(options.relation_heads), fastkd.FCDLoss()
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
texts = [line for line in Path(options.texts).read_text().splitlines() if line.strip()]
last = {model: depth(model) - 1 for model in (teacher, student)}

for step in range(options.steps):
    drawn = [texts[i] for i in torch.randint(len(texts), (options.batch_size,))]
    batch = tokenizer(drawn, padding=True, truncation=True, max_length=128, return_tensors="pt").to(device)
    with torch.no_grad():
        teacher_states = read(teacher, batch, hidden=True, layers=[last[teacher]], predictions=False)
    student_states = read(student, batch, hidden=True, layers=[last[student]], predictions=False)
    mask = batch["attention_mask"]
    relation = relations(
        student_states.qkv[last[student]][:3], teacher_states.qkv[last[teacher]][:3], mask
    )  # (q, k, v) of each
    similarity = similarities(student_states.hidden[-1], teacher_states.hidden[-1], mask)
    (relation + similarity).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 100 == 0:
        print(f"step {step}: relations {relation.item():.4f}, similarities {similarity.item():.4f}")

forget_attention(student)
student.save_pretrained(options.output)
tokenizer.save_pretrained(options.output)
