"""VocabMap: a student's vocabulary as a subset of its teacher's (GLMD's vocabulary compression)."""

import copy
import importlib.util
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastkd import checks
from fastkd.vocab import models

METHODS = ("decoder", "cosine", "euclidean", "unk")
_STEM, _SUFFIXES = "vocab_map", (".safetensors", ".json")
# The ids that Hugging Face configurations hold.
_CONFIG_IDS = (
    "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id",
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "image_token_id", "video_token_id",
    "pad_index", "bos_index", "eos_index", "unk_index", "mask_index",
)  # fmt: skip


class VocabMap(nn.Module):
    """A smaller vocabulary: the kept ids of the original one, and a kept id that stands in for each dropped one.

    A kept id's new id is its position in `kept_ids`.

    Args:
        kept_ids: [K], original ids, each once.
        original_size: V, the number of original ids.
        replacement: The stand-ins: one kept original id for all dropped ones, or [V] a kept original id for each (entries at
            kept ids are ignored). None: dropped ids have no stand-in, and `encode` refuses them.

    Attributes:
        kept_ids: [K], the original id of each new id, a buffer.
        position_of: [V], the new id of each original id, -1 without a stand-in, a buffer.
        kept: [V], True where kept, a buffer.

    Example:
        >>> vocab = fastkd.VocabMap([0, 4, 2], original_size=6, replacement=0)
        >>> vocab.encode([4, 2, 5])  # 5 is dropped, and 0 stands in for it
        [1, 2, 0]
        >>> counts = torch.tensor([9, 1, 5, 0, 7, 2])  # of each original id in a corpus
        >>> fastkd.VocabMap.from_counts(counts, size=3, multiple_of=1, always_keep=[5]).kept_ids
        tensor([5, 0, 4])
    """

    def __init__(self, kept_ids, original_size: int, replacement=None):
        super().__init__()
        kept_ids = torch.as_tensor(kept_ids).detach().clone()
        if kept_ids.numel() == 0:
            raise ValueError("kept_ids: is empty; keep at least one id")
        checks.integers("kept_ids", kept_ids, "[K]")
        kept_ids = kept_ids.long()
        checks.indices_in_range("kept_ids", kept_ids, original_size, "original vocabulary")
        position_of = torch.full((original_size,), -1, dtype=torch.int64, device=kept_ids.device)
        position_of[kept_ids] = torch.arange(len(kept_ids), device=kept_ids.device)
        kept = position_of >= 0  # [V]
        if int(kept.sum()) != len(kept_ids):
            ids, times = kept_ids.unique(return_counts=True)
            raise ValueError(f"kept_ids: each id may occur once, but {_some(ids[times > 1])} occur more often")
        if replacement is not None:
            replacement = torch.as_tensor(replacement, device=kept_ids.device).long().expand(original_size)
            stand_in = torch.where(kept, torch.arange(original_size, device=kept_ids.device), replacement)
            checks.indices_in_range("replacement", stand_in, original_size, "original vocabulary")
            lost = ~kept[stand_in]
            if bool(lost.any()):
                raise ValueError(f"replacement: must be kept ids, but {_some(stand_in[lost].unique())} are dropped too")
            position_of = position_of[stand_in]
        self.register_buffer("kept_ids", kept_ids)  # [K]
        self.register_buffer("position_of", position_of)  # [V]
        self.register_buffer("kept", kept)  # [V]
        self._complete = bool((position_of >= 0).all())
        self._slices = {}

    @property
    def original_size(self) -> int:
        return self.position_of.shape[0]

    @property
    def has_stand_ins(self) -> bool:
        """Whether each dropped token has a stand-in."""
        return self._complete

    def __len__(self) -> int:
        return self.kept_ids.shape[0]

    def extra_repr(self) -> str:
        return f"{len(self)} of {self.original_size}"

    @classmethod
    def from_counts(
        cls,
        counts,
        size: int | float = 0.5,
        *,
        multiple_of: int = 128,
        always_keep=(),
        in_place=(),
        embeddings: Tensor | None = None,
        method: str | None = None,
        unk_id: int | None = None,
    ) -> "VocabMap":
        """Keep the ids in `always_keep`, then the most frequent ones.

        Args:
            counts: [V], the number of occurrences of each id in a corpus.
            size: The number of ids to keep, or a fraction of V; rounded up to `multiple_of`, at most V.
            multiple_of: Round `size` up to a multiple of this, for fast matrix products.
            always_keep: Ids to keep, whatever their counts.
            in_place: Ids to keep with their numbers unchanged, as some models require of the padding id.
            embeddings: [V, D], the teacher's input embeddings, from which stand-ins are chosen.
            method: How a dropped id's stand-in is chosen: the kept id with the nearest embedding by dot product ("decoder",
                as in the authors' code), by angle ("cosine") or by distance ("euclidean"); or always `unk_id` ("unk"). None:
                "decoder" with embeddings, else "unk" with unk_id, else there are no stand-ins.
            unk_id: The id of the unknown token.

        Returns:
            A VocabMap whose ids are sorted: those always kept first, then by count, ties by id.
        """
        counts = torch.as_tensor(counts)
        checks.tensor("counts", counts, "[V]", floating=False)
        total = counts.shape[0]
        checks.positive("size", size)
        checks.positive("multiple_of", multiple_of)
        if isinstance(size, float) and size > 1:
            raise ValueError(f"size: a fraction must lie in (0, 1], got {size!r}; an int is a number of ids")
        wanted = int(size * total) if isinstance(size, float) else size
        wanted = min(max(-(-wanted // multiple_of) * multiple_of, 1), total)
        first = torch.as_tensor([*always_keep, *in_place, *([] if unk_id is None else [unk_id])], dtype=torch.int64)
        checks.indices_in_range("always_keep (in_place and unk_id)", first, total, "original vocabulary")
        if method is None:
            method = "decoder" if embeddings is not None else "unk" if unk_id is not None else None
        else:
            checks.one_of("method", method, METHODS)
        counts = counts.cpu()
        always = torch.zeros(total, dtype=torch.bool).index_fill(0, first, True)  # [V]
        if int(always.sum()) > wanted:
            raise ValueError(
                f"size: {wanted} tokens are fewer than the {int(always.sum())} that are always kept (always_keep; in fastkd "
                "vocab special tokens, single characters and --keep); choose a larger size"
            )
        order = counts.argsort(descending=True, stable=True)  # [V]
        kept_ids = torch.cat([order[always[order]], order[~always[order]]])[:wanted]
        if max(in_place, default=0) >= wanted:
            raise ValueError(f"in_place: id {max(in_place)} cannot keep its number among {wanted} kept ids")
        if fixed := set(in_place):
            others = iter([i for i in kept_ids.tolist() if i not in fixed])
            kept_ids = torch.tensor([i if i in fixed else next(others) for i in range(wanted)])
        return cls(kept_ids, total, _stand_ins(kept_ids, total, method, embeddings, unk_id))

    def encode(self, ids):
        """Original ids -> new ids; negative ones, such as ignore_index, stay as they are.

        Args:
            ids: A tensor, a list, or one int.
        """
        if not isinstance(ids, Tensor):
            given = torch.as_tensor(ids, dtype=torch.int64, device=self.position_of.device)
            return self.encode(given).tolist()
        checks.indices_in_range("ids", ids.clamp_min(0), self.original_size, "original vocabulary")
        new = torch.where(ids < 0, ids, self.position_of[ids.clamp_min(0).long()].to(ids.dtype))
        if not self._complete:
            lost = (new < 0) & (ids >= 0)
            message = "some are dropped from this vocabulary and have no stand-in; pass VocabMap a replacement"
            checks.values("ids", ids, lambda: ~lost.any(), message)
        return new

    def slice_logits(self, logits: Tensor) -> Tensor:
        """Logits [..., V] -> [..., K] of the kept tokens, in the order of `kept_ids`. Padding beyond V is left out."""
        if logits.shape[-1] < self.original_size:
            raise ValueError(
                f"teacher_logits: expected the original vocabulary of {self.original_size} tokens (or more, padded), "
                f"got {checks.describe(logits)}"
            )
        return logits[..., self.kept_ids]

    def check_student(self, name: str, logits: Tensor) -> None:
        if logits.shape[-1] != len(self):
            raise ValueError(
                f"{name}: expected {len(self)} tokens, as vocab keeps, got {checks.describe(logits)}; "
                "shrink the student with vocab.shrink(model)"
            )

    def slice_head(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The rows of a frozen head for the kept tokens: weight [V, D] -> [K, D], bias [V] -> [K], contiguous.

        The result is cached until the storage or the version of the tensor changes. Writing through `.data` changes neither.
        """
        checks.tensor("weight", weight, "[V, D]")
        if weight.shape[0] < self.original_size:
            raise ValueError(
                f"weight: expected the teacher's head over {self.original_size} tokens, got {checks.describe(weight)}"
            )
        return self._slice("weight", weight), None if bias is None else self._slice("bias", bias)

    def _slice(self, name: str, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or x.is_inference() or self.kept_ids.is_inference():
            return x.detach()[self.kept_ids]
        storage = StorageWeakRef(x.untyped_storage())  # keeps the address from being reused without keeping the memory
        signs = (
            x.data_ptr(),
            x._version,
            x.shape,
            x.stride(),
            x.dtype,
            self.kept_ids.data_ptr(),
            self.kept_ids._version,
        )
        if name in self._slices:
            known_storage, known_signs, rows = self._slices[name]
            if known_storage == storage and known_signs == signs:
                return rows
        rows = x.detach()[self.kept_ids]
        self._slices[name] = (storage, signs, rows)
        return rows

    def __getstate__(self):
        return {**super().__getstate__(), "_slices": {}}  # the cache is not copied, pickled or moved

    def _apply(self, fn, recurse=True):
        self._slices.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._complete = bool((self.position_of >= 0).all())
        self._slices.clear()

    def save(self, path) -> Path:
        """Write the map; returns the file.

        Args:
            path: A folder, or a file *.safetensors or *.json. In a folder, safetensors is used where it is installed.
        """
        path = Path(path)
        if path.suffix not in _SUFFIXES:
            path.mkdir(parents=True, exist_ok=True)
            for suffix in _SUFFIXES:  # an older map in the other format would be read in its place
                (path / (_STEM + suffix)).unlink(missing_ok=True)
            path = path / (_STEM + _SUFFIXES[0 if importlib.util.find_spec("safetensors") else 1])
        tensors = {"kept_ids": self.kept_ids.cpu(), "position_of": self.position_of.cpu()}
        if path.suffix == ".json":
            path.write_text(json.dumps({name: x.tolist() for name, x in tensors.items()}))
        else:
            from safetensors.torch import save_file

            save_file(tensors, path)
        return path

    @classmethod
    def load(cls, path) -> "VocabMap":
        """Read what `save` wrote to the same path."""
        path = Path(path)
        if path.is_dir():
            files = [path / (_STEM + suffix) for suffix in _SUFFIXES]
            found = [file for file in files if file.exists()]
            if not found:
                raise ValueError(
                    f"path: {path} holds neither {files[0].name} nor {files[1].name}; VocabMap.save writes one"
                )
            path = found[0]
        if path.suffix == ".json":
            tensors = {name: torch.tensor(x, dtype=torch.int64) for name, x in json.loads(path.read_text()).items()}
        else:
            from safetensors.torch import load_file

            tensors = load_file(path)
        kept_ids, position_of = tensors["kept_ids"], tensors["position_of"]
        vocab = cls(kept_ids, len(position_of))
        vocab.position_of.copy_(position_of)
        vocab._complete = bool((position_of >= 0).all())
        return vocab

    @torch.no_grad()
    def shrink(self, model: nn.Module, *, inplace: bool = False) -> nn.Module:
        """A Hugging Face model over the kept tokens, with its embeddings, head, bias and configuration cut down.

        The new model takes new ids: pass it `encode(input_ids)`, and labels likewise. It equals what `from_pretrained` loads
        from its saved files. The special ids of its configuration must be kept.

        Args:
            model: The model; it is not changed.
            inplace: Change `model` itself.
        """
        embeddings = model.get_input_embeddings()
        size, padding = embeddings.weight.shape[0], getattr(embeddings, "padding_idx", None)
        if size < self.original_size:
            raise ValueError(f"model: has {size} tokens, but this VocabMap was made for {self.original_size}")
        special = {"padding_idx": padding} | {
            name: getattr(c, name) for c in models.configurations(model) for name in _CONFIG_IDS if hasattr(c, name)
        }
        self._check_special({name: ids for name, ids in special.items() if ids is not None})
        moved = set() if padding is None else models.position_tables(model, padding)
        shift = 0 if padding is None else self.encode(padding) - padding
        config, generation = (self._encoded(c) for c in (model.config, getattr(model, "generation_config", None)))
        config.get_text_config().vocab_size = len(self)
        if moved:
            config.max_position_embeddings += shift
        axes = models.vocabulary_axes(model, size)
        state = {}
        for name, x in model.state_dict().items():
            for axis in axes[name]:
                x = x.index_select(axis, self.kept_ids.to(x.device))
            if name in moved and shift:
                old, x = x, x.new_zeros(x.shape[0] + shift, x.shape[1])
                x[padding + shift :] = old[padding:]
            state[name] = x if inplace or axes[name] else x.clone()
        small = models.build(model, config, state)
        if generation is not None:
            small.generation_config = generation
        if getattr(small.get_input_embeddings(), "padding_idx", None) != (None if padding is None else padding + shift):
            raise ValueError(
                f"model: a {type(model).__name__} has its padding id {padding} fixed, and this VocabMap makes it "
                f"{padding + shift}; keep it with VocabMap.from_counts(..., in_place=[{padding}])"
            )
        if not inplace:
            return small
        model.__dict__.update(small.__dict__)
        return model

    def shrink_tokenizer(self, tokenizer, *, dropped: str = "spelled"):
        """A fast tokenizer that gives the new ids, for `save_pretrained`.

        Args:
            tokenizer: The original fast tokenizer.
            dropped: What becomes of dropped tokens. "spelled": they are spelled with kept ones. "stand_in": they become their
                stand-ins, as by `encode`; transformers then loads the tokenizer with trust_remote_code=True.
        """
        from fastkd.vocab.tokenizer import shrink_tokenizer

        return shrink_tokenizer(self, tokenizer, dropped)

    def expand(self, x: Tensor, dim: int = -1) -> Tensor:
        """Entries of the kept tokens -> entries of all: [..., K] -> [..., V]; a dropped token gets its stand-in's.

        Args:
            x: The tensor.
            dim: The axis of size K.
        """
        if not self._complete:
            raise ValueError("expand: some tokens are dropped and have no stand-in; pass VocabMap a replacement")
        return x.index_select(dim, self.position_of.to(x.device))

    def _encoded(self, configuration):
        """A copy with the new ids; two names of one id (pad_index, pad_token_id) are both read before either is set."""
        new = copy.deepcopy(configuration)
        for known in [] if new is None else {id(c): c for c in (new, models.text_part(new))}.values():
            old = {name: getattr(known, name) for name in _CONFIG_IDS if getattr(known, name, None) is not None}
            for name, ids in old.items():
                setattr(known, name, self._encode_known(ids))
        return new

    def _encode_known(self, ids):
        """An id or a list of ids of a configuration; ids outside the vocabulary are left as they are."""
        if isinstance(ids, (list, tuple)):
            return [self._encode_known(i) for i in ids]
        return self.encode(ids) if isinstance(ids, int) and 0 <= ids < self.original_size else ids

    def _check_special(self, special: dict) -> None:
        flat = {name: ids if isinstance(ids, (list, tuple)) else [ids] for name, ids in special.items()}
        known = {
            name: [i for i in ids if isinstance(i, int) and 0 <= i < self.original_size] for name, ids in flat.items()
        }
        dropped = {name: ids for name, ids in known.items() if not all(self.kept[i] for i in ids)}
        if dropped:
            raise ValueError(
                f"model: its configuration needs ids that are dropped, {dropped}; name them in always_keep"
            )


def _stand_ins(kept_ids: Tensor, total: int, method: str | None, embeddings: Tensor | None, unk_id: int | None):
    """The `replacement` of `method`: None, one id, or the nearest kept id for each id [V]."""
    if method is None:
        return None
    if method == "unk":
        if unk_id is None:
            raise ValueError("unk_id: method='unk' needs the id that stands for every dropped one")
        return unk_id
    if embeddings is None:
        raise ValueError(f"embeddings: method={method!r} needs the teacher's embeddings [V, D]")
    checks.tensor("embeddings", embeddings, "[V, D]")
    if embeddings.shape[0] < total:
        raise ValueError(f"embeddings: expected one row for each of {total} ids, got {checks.describe(embeddings)}")
    table = embeddings[:total].detach().float()  # [V, D]
    if method == "cosine":
        table = nn.functional.normalize(table, dim=-1)
    near = table[kept_ids.to(table.device)]  # [K, D]
    # The largest of 2 e·k - |k|² is the smallest of |e - k|².
    handicap = near.square().sum(-1) / 2 if method == "euclidean" else near.new_zeros(len(near))
    nearest = [(rows @ near.t() - handicap).argmax(-1) for rows in table.split(4096)]
    return kept_ids[torch.cat(nearest).cpu()]


def _some(ids: Tensor) -> str:
    """The first few of many ids."""
    shown = ", ".join(str(i) for i in ids[:8].tolist())
    return shown + (f", … ({len(ids)} in all)" if len(ids) > 8 else "")
