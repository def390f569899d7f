"""A fast tokenizer over the kept tokens of a VocabMap, which transformers loads without fastkd.

dropped="spelled" (the default): dropped tokens are removed from the tokenizer, which then spells them with kept tokens. A
text whose tokens are all kept gets exactly VocabMap.encode of its old ids. The result is a plain tokenizer.json. If the token
of each single character is kept, as with counts from `count_parts`, no text is lost, and the teacher of `fastkd distill`,
which reads the student's tokens, reads the same text.
dropped="stand_in": every text gets VocabMap.encode of its old ids, as in GLMD. A tokenizer.json cannot express this, so a
second file and a class are saved beside it, which transformers runs with trust_remote_code=True only. Without it, where the
model's configuration names another class, the same folder loads as the tokenizer that spells.
"""

import copy
import json
import re

from torch import Tensor

from fastkd import checks

# Options that are copied from the original tokenizer.
_KEPT_OPTIONS = ("model_max_length", "padding_side", "truncation_side", "chat_template", "clean_up_tokenization_spaces",
                 "model_input_names")  # fmt: skip


DROPPED = ("spelled", "stand_in")
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def shrink_tokenizer(vocab, tokenizer, dropped: str = "spelled"):
    """The tokenizer that gives `vocab`'s new ids; see the top of this file for `dropped`.

    Special tokens must be kept, and so must the parts from which kept BPE tokens are merged; counts from `count_parts`
    ensure the latter.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"tokenizer: expected a fast tokenizer, got {type(tokenizer).__name__}; it has no tokenizer.json"
        )
    checks.one_of("dropped", dropped, DROPPED)
    state = json.loads(backend.to_str())
    whole = copy.deepcopy(state)
    new_id = {old: new for new, old in enumerate(vocab.kept_ids.tolist())}
    added = {entry["id"] for entry in state["added_tokens"]}
    special = {entry["content"]: entry["id"] for entry in state["added_tokens"] if entry["special"]}
    lost = [word for word, old in special.items() if old < vocab.original_size and old not in new_id]
    if lost:
        raise ValueError(f"tokenizer: its special tokens {lost} are dropped; pass their ids in always_keep")
    state["added_tokens"] = sorted(
        ({**entry, "id": new_id[entry["id"]]} for entry in state["added_tokens"] if entry["id"] in new_id),
        key=lambda entry: entry["id"],
    )
    _shrink_model(state["model"], new_id, added)
    _move_ids(state.get("post_processor"), new_id)
    if state.get("padding"):
        state["padding"]["pad_id"] = new_id[state["padding"]["pad_id"]]
    options = {name: getattr(tokenizer, name) for name in _KEPT_OPTIONS if getattr(tokenizer, name, None) is not None}
    names = {name: word for name, word in tokenizer.special_tokens_map.items() if isinstance(word, str)}
    small = Tokenizer.from_str(json.dumps(state))
    if dropped == "spelled":
        return PreTrainedTokenizerFast(tokenizer_object=small, **names, **options)
    from fastkd.vocab.stand_in_tokenizer import StandInTokenizerFast

    whole.update(truncation=None, padding=None)
    stand_ins = {"tokenizer": whole, "new_ids": _new_ids(vocab, backend)}
    return StandInTokenizerFast(tokenizer_object=small, stand_ins=stand_ins, **names, **options)


def _new_ids(vocab, backend) -> list[int]:
    if not vocab.has_stand_ins:
        raise ValueError("dropped='stand_in': some tokens have no stand-in; pass VocabMap a replacement")
    size = max(backend.get_vocab().values()) + 1
    if size > vocab.original_size:
        raise ValueError(f"tokenizer: has {size} tokens, but this VocabMap was made for {vocab.original_size}")
    return vocab.position_of.tolist()


def count_parts(counts: Tensor, tokenizer) -> Tensor:
    """counts [V], raised so that `VocabMap.from_counts` keeps the tokens with which the others are spelled.

    The tokens of single characters ("x" at the start of a word, "##x" within) come before all others: if as many ids are
    kept, every counted token can be spelled. English has about 100 of them, a corpus of all scripts may have thousands.
    The two parts of a BPE merge are counted at least as often as the merged token, so that they are kept with it.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    total, letters = counts.sum() + 1, sorted(set().union(*_letters(counts, tokenizer).values()) - {None})
    counts = counts.clone()
    if model["type"] == "BPE":
        ids = model["vocab"]
        for left, right in reversed([_pair(merge) for merge in model["merges"]]):
            whole = ids.get(left + right)
            for part in (ids[left], ids[right]):
                if whole is not None and part != whole:
                    counts[part] += counts[whole]  # at least as often; ties go by id, and parts have lower ids
    counts[letters] += counts.max() + total
    return counts


def may_be_lost(vocab, counts: Tensor, tokenizer) -> int:
    """How many of the counted tokens have a character without a kept token of its own: an upper bound on how many become
    the unknown token where they are spelled. With 0, none of the counted text is lost."""
    kept = {None: False, **dict(enumerate(vocab.kept.tolist()))}
    lost = [i for i, letters in _letters(counts, tokenizer).items() if not all(kept[letter] for letter in letters)]
    return int(counts[lost].sum())


def _letters(counts: Tensor, tokenizer) -> dict[int, set]:
    """For each counted token, the ids of the single-character tokens that spell it, None for one that does not exist."""
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
    if kind == "Unigram":  # ids are positions in a list
        pieces = model["vocab"]
        order = sorted((new, old) for old, new in new_id.items() if old < len(pieces))
        if [new for new, _ in order] != list(range(len(order))):
            raise ValueError("tokenizer: tokens that were added to a Unigram model must come last among the kept ids")
        model["vocab"] = [pieces[old] for _, old in order]
        if model.get("unk_id") is not None:
            if model["unk_id"] not in new_id:
                raise ValueError("tokenizer: its unknown token is dropped; pass its id in always_keep")
            model["unk_id"] = new_id[model["unk_id"]]
        return
    if kind not in ("WordPiece", "BPE", "WordLevel"):
        raise ValueError(f"tokenizer: expected WordPiece, BPE, Unigram or WordLevel, got {kind}")
    before = model["vocab"]
    model["vocab"] = {word: new_id[old] for word, old in before.items() if old in new_id}
    if model.get("unk_token") is not None and model["unk_token"] not in model["vocab"]:
        raise ValueError(f"tokenizer: its unknown token {model['unk_token']!r} is dropped; pass its id in always_keep")
    if kind == "BPE":
        kept = model["vocab"]
        merges = [_pair(merge) for merge in model["merges"]]
        made = [pair for pair in merges if pair[0] in kept and pair[1] in kept and pair[0] + pair[1] in kept]
        within = {left + right for left, right in made}
        lost = {left + right for left, right in merges if left + right in kept} - within
        lost -= {word for word, old in before.items() if old in added}
        if lost:
            raise ValueError(
                f"tokenizer: {len(lost)} kept tokens, {sorted(lost)[:4]} …, are merged from dropped ones; choose the kept ids "
                "by fastkd.vocab.tokenizer.count_parts(counts, tokenizer)"
            )
        model["merges"] = [list(pair) for pair in made]


def _move_ids(processor, new_id: dict) -> None:
    """The post-processor, which adds special tokens, holds their ids."""
    if processor is None:
        return
    for part in processor.get("processors", ()):
        _move_ids(part, new_id)
    for end in ("sep", "cls"):
        if end in processor:
            processor[end][1] = new_id[processor[end][1]]
    for entry in (processor.get("special_tokens") or {}).values():
        entry["ids"] = [new_id[old] for old in entry["ids"]]
