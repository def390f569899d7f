"""A tokenizer over a smaller vocabulary that splits a text as the original tokenizer does, and maps dropped tokens to stand-ins.

save_pretrained puts this file beside it, and AutoTokenizer.from_pretrained(folder, trust_remote_code=True) loads both; only
transformers is needed.
"""

import json
from pathlib import Path
from typing import ClassVar

from tokenizers import Tokenizer
from transformers import BatchEncoding, PreTrainedTokenizerFast

_FILE = "stand_ins.json"
_SHARED = ("padding_side", "truncation_side", "model_max_length", "split_special_tokens", "model_input_names")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class StandInTokenizerFast(PreTrainedTokenizerFast):
    """Texts are split by the original tokenizer; everything else, decoding too, uses the tokenizer.json of the kept tokens.

    stand_ins: {"tokenizer": the original tokenizer.json, "new_ids": the new id of each of its ids}.
    """

    vocab_files_names: ClassVar = {**PreTrainedTokenizerFast.vocab_files_names, "stand_ins_file": _FILE}

    @classmethod
    def convert_to_native_format(cls, trust_remote_code=False, **kwargs):
        return kwargs  # otherwise a class with an __init__ gets only the vocabulary, not tokenizer.json

    def __init__(self, *args, stand_ins=None, stand_ins_file=None, **kwargs):
        super().__init__(*args, **kwargs)
        if stand_ins is None:
            stand_ins = json.loads(Path(stand_ins_file).read_text(encoding="utf-8"))
        self._stand_ins, self._new_ids = stand_ins, stand_ins["new_ids"]
        self._whole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(stand_ins["tokenizer"])))

    def _encode_plus(self, *args, return_tensors=None, **kwargs) -> BatchEncoding:
        for name in _SHARED:
            setattr(self._whole, name, getattr(self, name))
        for name in _SPECIAL:
            if getattr(self, name) != getattr(self._whole, name):
                setattr(self._whole, name, getattr(self, name))
        found = self._whole._encode_plus(*args, **kwargs)
        ids = found["input_ids"]
        one_text = not (ids and isinstance(ids[0], list))
        found["input_ids"] = self._renumbered([ids])[0] if one_text else self._renumbered(ids)
        return BatchEncoding(dict(found), found.encodings, return_tensors, one_text and return_tensors is not None)

    def _renumbered(self, rows: list[list[int]]) -> list[list[int]]:
        return [[self._new_ids[i] for i in row] for row in rows]

    def _convert_token_to_id_with_added_voc(self, token: str) -> int:
        old = self._whole.backend_tokenizer.token_to_id(token)
        return super()._convert_token_to_id_with_added_voc(token) if old is None else self._new_ids[old]

    def _add_tokens(self, new_tokens, special_tokens=False) -> int:
        unknown = [str(token) for token in new_tokens if self._tokenizer.token_to_id(str(token)) is None]
        if unknown and hasattr(self, "_whole"):
            raise ValueError(
                f"new_tokens: {unknown} are in no VocabMap; add them to the tokenizer before making the map"
            )
        return super()._add_tokens(new_tokens, special_tokens)

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        path = Path(save_directory) / ((filename_prefix + "-" if filename_prefix else "") + _FILE)
        path.write_text(json.dumps(self._stand_ins, ensure_ascii=False), encoding="utf-8")
        return (*files, str(path))


StandInTokenizerFast.register_for_auto_class("AutoTokenizer")
