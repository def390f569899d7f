"""What the teacher says of every training example, computed once: later epochs and later runs do without its forward.

One safetensors file; its header names what it was made from, and a file made from anything else is refused, never used
and never overwritten. Only logits are kept, so only methods that read nothing else can use it.
"""

import hashlib
from pathlib import Path

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastkd import atomic_write, interruption

from . import states

FILE = "teacher_logits.safetensors"
TASKS = ("classification", "regression")


def check_method(method, task: str, data) -> None:
    if task not in TASKS:
        raise ValueError(
            f"teacher_cache: keeps one row of logits per example, for {' and '.join(TASKS)}; {task} predicts words. Leave "
            "it out"
        )
    if "example_id" not in getattr(data, "column_names", ()):
        raise ValueError(
            "teacher_cache: finds an example again by its number, and train_dataset has no column 'example_id'; add one with "
            "0, 1, 2, … to its length, or leave the cache out"
        )
    if method.levels("teacher") or method.attention("teacher"):
        raise ValueError(
            "teacher_cache: this method reads the teacher's hidden states or attention, which a cache of logits does not "
            "have; leave it out, or choose kd"
        )


def logits(
    folder, teacher, data, collator, accepts: set[str], task: str, batch_size: int, device, words=None
) -> Tensor:
    """[examples, C] in float32, on `device`, by example_id: read from `folder`, or computed and kept there."""
    path, shape = Path(folder) / FILE, (max(data["example_id"]) + 1, teacher.config.num_labels)
    wanted = {"task": task, "teacher": hash_of_model(teacher), "data": hash_of_data(data)}
    if path.exists():
        return _read(path, wanted, shape).to(device)
    rows = _compute(shape, teacher, data, collator, accepts, batch_size, device, words)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write.replacing(path) as scratch:
        save_file({"logits": rows}, scratch, metadata=wanted)
    return rows.to(device)


def _read(path: Path, wanted: dict[str, str], shape: tuple[int, int]) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            found, kept = file.metadata() or {}, file.get_tensor("logits")
    except SafetensorError as error:
        raise ValueError(f"teacher_cache: {path} is not a cache of fastkd ({error}); choose another folder") from error
    differing = [name for name, value in wanted.items() if found.get(name) != value]
    if differing:
        raise ValueError(
            f"teacher_cache: {path} was made with another {' and another '.join(differing)} than this run has; choose "
            "another folder, or delete it to make it anew"
        )
    if kept.dtype != torch.float32 or kept.shape != shape:
        raise ValueError(
            f"teacher_cache: {path} should hold float32 {list(shape)}, and holds {kept.dtype} {list(kept.shape)}; "
            "delete it to make it anew"
        )
    return kept


@torch.no_grad()
def _compute(shape, teacher, data, collator, accepts, batch_size: int, device, words) -> Tensor:
    kept = torch.full(shape, torch.nan)  # a row that nobody asks for stays so
    starts = range(0, len(data), batch_size)
    for start in track(starts, description="teacher"):
        interruption.check()
        examples = [data[i] for i in range(start, min(start + batch_size, len(data)))]
        numbers = torch.tensor([example["example_id"] for example in examples])
        inputs = {name: x.to(device) for name, x in collator(examples).items() if name in accepts and name != "labels"}
        if words is not None:
            inputs["input_ids"] = words[inputs["input_ids"]]
        kept[numbers] = states.read(teacher, inputs).logits.float().cpu()
    return kept


def hash_of_model(model) -> str:
    """Of every weight, its name and dtype."""
    digest = hashlib.blake2b(digest_size=16)
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_of_data(data) -> str:
    """Of what the teacher reads: the tokens of every example, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted({"input_ids", "token_type_ids", "attention_mask"} & set(data.column_names)):
        for row in data[name]:
            digest.update(f"{name}{row}".encode())
    return digest.hexdigest()
