"""`python -m fastkd.bench.evidence.capture [rounds]`: what reading all states of a BERT-base costs, in CPU time of all threads.

4 sequences of 128 tokens: the model by itself under SDPA with output_hidden_states=True, and the same read by
fastkd.train.states.read, which also records queries, keys and values of all layers. They take turns, so that ratios are of
neighbours.
"""

import argparse
import statistics
import time

import torch
from transformers import BertConfig, BertForSequenceClassification, logging

from fastkd.train import states


def plain(model, inputs: dict):
    out = model(**inputs, output_hidden_states=True)
    return out.logits, out.hidden_states


def captured(model, inputs: dict):
    out = states.read(model, inputs, hidden=True, layers=range(12))
    assert len(out.qkv) == 12
    return out.logits, out.hidden


def seconds(read, model, inputs: dict, backward: bool) -> float:
    begin = time.process_time()
    with torch.set_grad_enabled(backward):
        logits, hidden = read(model, inputs)
    if backward:
        (logits.sum() + sum(x.mean() for x in hidden)).backward()
        model.zero_grad()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", type=int, nargs="?", default=10)
    rounds = parser.parse_args().rounds
    logging.set_verbosity_error()
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    states.record_attention(model)
    ids = torch.randint(1000, 30000, (4, 128))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for backward, name in ((True, "the student's forward and backward"), (False, "the teacher's forward")):
        took = {read: [] for read in (plain, captured)}
        for _ in range(rounds + 1):  # the first one warms up
            for read, found in took.items():
                (states.forget_attention if read is plain else states.record_attention)(model)
                found.append(seconds(read, model, inputs, backward))
        pairs = list(zip(*(found[1:] for found in took.values()), strict=True))
        ratio = statistics.median(with_states / without for without, with_states in pairs)
        without = statistics.median(x for x, _ in pairs)
        print(f"{name}: {1e3 * without:.0f} ms; with all states read {ratio - 1:+.2%} (median of {rounds} ratios)")


if __name__ == "__main__":
    main()
