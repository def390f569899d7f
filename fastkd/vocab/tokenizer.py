"""A fast tokenizer over the kept words of a VocabMap, which transformers loads without us. What a dropped word becomes:

"spelled": it is taken out of the tokenizer itself, which then spells it with kept pieces. A text whose words are all kept
gets exactly VocabMap.encode of its old ids, any other text some other kept ids, never one that is dropped.
"stand_in": any text gets VocabMap.encode of its old ids, the dropped words' stand-ins among them, as in GLMD.

"spelled" is the default: a tokenizer.json is all there is to it, so it loads anywhere; where each character's own piece
is kept, as by counts from `count_parts`, nothing of the text is lost, it decodes to what it was; and a teacher that reads
by the student's tokenizer (`fastkd distill`) reads the same text. A tokenizer.json has no place for stand-ins: it holds one
word per id, and the model that cuts a text numbers it too. They come as a second file and a class beside it, which
transformers runs after trust_remote_code=True only; without, where a model's configuration says what to load instead, the
same folder is the tokenizer that spells.
"""

import copy
import json
import re

from torch import Tensor

from fastkd import checks

# What a tokenizer's constructor takes beside its words.
_KEPT_OPTIONS = ("model_max_length", "padding_side", "truncation_side", "chat_template", "clean_up_tokenization_spaces",
                 "model_input_names")  # fmt: skip


DROPPED = ("spelled", "stand_in")
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def shrink_tokenizer(vocab, tokenizer, dropped: str = "spelled"):
    """The tokenizer that emits `vocab`'s new ids. Special words must be kept, and of BPE's words what they are merged of:
    counts from `count_parts` see to that. dropped: "spelled" or "stand_in", see above."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"tokenizer: expected a fast tokenizer, got {type(tokenizer).__name__}; it has no tokenizer.json"
        )
    checks.one_of("dropped", dropped, DROPPED)
    words = json.loads(backend.to_str())
    whole = copy.deepcopy(words)
    new_id = {old: new for new, old in enumerate(vocab.kept_ids.tolist())}
    added = {entry["id"] for entry in words["added_tokens"]}
    special = {entry["content"]: entry["id"] for entry in words["added_tokens"] if entry["special"]}
    lost = [word for word, old in special.items() if old < vocab.original_size and old not in new_id]
    if lost:
        raise ValueError(f"tokenizer: its special words {lost} are dropped; name their ids in always_keep")
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
    small = Tokenizer.from_str(json.dumps(words))
    if dropped == "spelled":
        return PreTrainedTokenizerFast(tokenizer_object=small, **names, **options)
    from fastkd.vocab.stand_in_tokenizer import StandInTokenizerFast

    whole.update(truncation=None, padding=None)
    stand_ins = {"tokenizer": whole, "new_ids": _new_ids(vocab, backend)}
    return StandInTokenizerFast(tokenizer_object=small, stand_ins=stand_ins, **names, **options)


def _new_ids(vocab, backend) -> list[int]:
    if not vocab.has_stand_ins:
        raise ValueError("dropped='stand_in': some words have no stand-in; give VocabMap a replacement")
    words = max(backend.get_vocab().values()) + 1
    if words > vocab.original_size:
        raise ValueError(f"tokenizer: has {words} words, but this VocabMap was made for {vocab.original_size}")
    return vocab.position_of.tolist()


def count_parts(counts: Tensor, tokenizer) -> Tensor:
    """counts [V] by which `VocabMap.from_counts` keeps what the others are spelled with.

    Each character of the counted pieces comes before all of them, as the piece of its own that it has in its place ("x" at
    the start of a word, "##x" within); with as many ids kept as there are such pieces, all that was counted can be spelled.
    English has about 100 of them; a corpus of all scripts may have thousands. Each word of a BPE tokenizer also counts for
    the two that it is merged of: whatever number of ids is kept, none of them is out of reach.
    """
    words = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    total, letters = counts.sum() + 1, sorted(set().union(*_letters(counts, tokenizer).values()) - {None})
    counts = counts.clone()
    if words["type"] == "BPE":
        ids = words["vocab"]
        for left, right in reversed([_pair(merge) for merge in words["merges"]]):
            whole = ids.get(left + right)
            for part in (ids[left], ids[right]):
                if whole is not None and part != whole:
                    counts[part] += counts[whole]  # never rarer then; ties go by id, and parts were there first
    counts[letters] += counts.max() + total
    return counts


def may_be_lost(vocab, counts: Tensor, tokenizer) -> int:
    """How many of the counted tokens have a character for which no piece of its own is kept: at most so many become the
    unknown word where they are spelled. With 0, nothing of the counted text is lost."""
    kept = {None: False, **dict(enumerate(vocab.kept.tolist()))}
    lost = [i for i, letters in _letters(counts, tokenizer).items() if not all(kept[letter] for letter in letters)]
    return int(counts[lost].sum())


def _letters(counts: Tensor, tokenizer) -> dict[int, set]:
    """Of each piece that was counted: the ids of the pieces of one character that spell it, None for one that there is not."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    before, behind = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    names, whole = tokenizer.get_vocab(), {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if model["type"] == "WordLevel":
        return {}
    found = {}
    for name, i in names.items():
        if i >= len(counts) or counts[i] == 0 or i in whole:
            continue
        if model.get("byte_fallback") and _BYTE.fullmatch(name):
            found[i] = {i}
            continue
        within, last = bool(before) and name.startswith(before), bool(behind) and name.endswith(behind)
        text = name[len(before) if within else 0 : len(name) - len(behind) if last else None]
        forms = [(before if within or at else "") + letter for at, letter in enumerate(text)]
        if last and forms:
            forms[-1] += behind
        found[i] = {names.get(form) for form in forms}
    return found


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
                "by fastkd.vocab.tokenizer.count_parts(counts, tokenizer)"
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
