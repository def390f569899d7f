"""A fast tokenizer over the kept words of a VocabMap, which transformers loads without us.

Dropped words are taken out of the tokenizer itself, so that it spells them with kept pieces: a text whose words are all
kept gets exactly VocabMap.encode of its old ids, any other text some other kept ids, never one that is dropped.
"""

import json

from torch import Tensor

# What a tokenizer's constructor takes beside its words.
_KEPT_OPTIONS = ("model_max_length", "padding_side", "truncation_side", "chat_template", "clean_up_tokenization_spaces",
                 "model_input_names")  # fmt: skip


def shrink_tokenizer(vocab, tokenizer):
    """The tokenizer that emits `vocab`'s new ids. Special words must be kept, and of BPE's words what they are merged of:
    counts from `count_parts` see to that."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"tokenizer: expected a fast tokenizer, got {type(tokenizer).__name__}; it has no tokenizer.json"
        )
    words = json.loads(backend.to_str())
    new_id = {old: new for new, old in enumerate(vocab.kept_ids.tolist())}
    added = {entry["id"] for entry in words["added_tokens"]}
    special = {entry["content"]: entry["id"] for entry in words["added_tokens"] if entry["special"]}
    dropped = [word for word, old in special.items() if old < vocab.original_size and old not in new_id]
    if dropped:
        raise ValueError(f"tokenizer: its special words {dropped} are dropped; name their ids in always_keep")
    words["added_tokens"] = sorted(
        ({**entry, "id": new_id[entry["id"]]} for entry in words["added_tokens"] if entry["id"] in new_id),
        key=lambda entry: entry["id"],
    )
    _shrink_model(words["model"], new_id, added)
    _move_ids(words.get("post_processor"), new_id)
    if words.get("padding"):
        words["padding"]["pad_id"] = new_id[words["padding"]["pad_id"]]
    options = {name: getattr(tokenizer, name) for name in _KEPT_OPTIONS if getattr(tokenizer, name, None) is not None}
    names = {name: word for name, word in tokenizer.special_tokens_map.items() if isinstance(word, str)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(words)), **names, **options)


def count_parts(counts: Tensor, tokenizer) -> Tensor:
    """counts [V], where each word of a BPE tokenizer also counts for the two that it is merged of: whatever number of
    words is then kept, none of them is out of reach. Other tokenizers' counts as they are."""
    words = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if words["type"] != "BPE":
        return counts
    counts, ids = counts.clone(), words["vocab"]
    for left, right in reversed([_pair(merge) for merge in words["merges"]]):
        whole = ids.get(left + right)
        for part in (ids[left], ids[right]):
            if whole is not None and part != whole:
                counts[part] += counts[whole]  # never rarer then; ties go by id, and parts were there first
    return counts


def _pair(merge) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _shrink_model(model: dict, new_id: dict, added: set) -> None:
    kind = model["type"]
    if kind == "Unigram":  # ids are places in a list
        pieces = model["vocab"]
        order = sorted((new, old) for old, new in new_id.items() if old < len(pieces))
        if [new for new, _ in order] != list(range(len(order))):
            raise ValueError("tokenizer: words that were added to a Unigram model must come last among the kept ids")
        model["vocab"] = [pieces[old] for _, old in order]
        if model.get("unk_id") is not None:
            if model["unk_id"] not in new_id:
                raise ValueError("tokenizer: its unknown word is dropped; name its id in always_keep")
            model["unk_id"] = new_id[model["unk_id"]]
        return
    if kind not in ("WordPiece", "BPE", "WordLevel"):
        raise ValueError(f"tokenizer: expected WordPiece, BPE, Unigram or WordLevel, got {kind}")
    before = model["vocab"]
    model["vocab"] = {word: new_id[old] for word, old in before.items() if old in new_id}
    if model.get("unk_token") is not None and model["unk_token"] not in model["vocab"]:
        raise ValueError(f"tokenizer: its unknown word {model['unk_token']!r} is dropped; name its id in always_keep")
    if kind == "BPE":
        kept = model["vocab"]
        merges = [_pair(merge) for merge in model["merges"]]
        made = [pair for pair in merges if pair[0] in kept and pair[1] in kept and pair[0] + pair[1] in kept]
        within = {left + right for left, right in made}
        lost = {left + right for left, right in merges if left + right in kept} - within
        lost -= {word for word, old in before.items() if old in added}
        if lost:
            raise ValueError(
                f"tokenizer: {len(lost)} kept words, {sorted(lost)[:4]} …, are merged of dropped ones; choose the kept ids "
                "by fastkd.vocab_tokenizer.count_parts(counts, tokenizer)"
            )
        model["merges"] = [list(pair) for pair in made]


def _move_ids(processor, new_id: dict) -> None:
    """What surrounds a text with special words knows them by id."""
    if processor is None:
        return
    for part in processor.get("processors", ()):
        _move_ids(part, new_id)
    for end in ("sep", "cls"):
        if end in processor:
            processor[end][1] = new_id[processor[end][1]]
    for entry in (processor.get("special_tokens") or {}).values():
        entry["ids"] = [new_id[old] for old in entry["ids"]]
