"""Several processes that train together: batches of one shape, and learned state that begins alike."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from .states import layer_list

FILLS = {"labels": -100}  # of a token of padding; 0 for what is not named


def process_group(args):
    """The ranks that train together; None for one process. args: TrainingArguments."""
    return dist.group.WORLD if args.world_size > 1 else None


def find_unused(args) -> None:
    """Let DDP expect parameters without a gradient: a method may read no predictions. Trainer does not under checkpointing;
    it is only reentrant checkpointing that cannot be combined with it."""
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    if args.ddp_find_unused_parameters is None and not reentrant:
        args.ddp_find_unused_parameters = True


def check_sharding(trainer) -> None:
    """Raise where --fsdp would be passed over in silence."""
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError(
            f"fsdp: accelerate shards a model over several GPUs started by torchrun or accelerate launch, and this run has "
            f"{trainer.args.world_size} processes on {trainer.args.device.type}; leave --fsdp out"
        )


def check_replicas(trainer, method, student: nn.Module) -> None:
    """Raise where the method cannot train a student that is sharded, or learns more than is worth replicating beside it."""
    name = " + ".join(method.methods)
    layers, levels = method.attention("student", 0.0), method.levels("student", 0.0)
    beneath = max(layers, default=-1) >= max(levels, default=0) and not method.predicts("student", 0.0)
    if beneath and trainer.is_fsdp_enabled:
        raise ValueError(
            f"method: {name} reads queries and keys of a layer and nothing above them, and FSDP gathers a layer's weights "
            f"for a gradient of its output only; add a method that reads predictions, as in {name} + kd, or use DDP"
        )
    if not list(method.parameters()) or not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_deepspeed_enabled or plugin.fsdp_version != 2 or trainer.args.fp16:
        raise ValueError(
            f"method: {name} learns pieces of its own, which train beside a sharded student under FSDP2 without fp16 only; "
            "choose fsdp_config version 2 and bf16, or use DDP"
        )
    learned, own = (sum(x.numel() for part in (m.parameters(), m.buffers()) for x in part) for m in (method, student))
    if learned > own:
        raise ValueError(
            f"method: {name} keeps {learned:,} numbers, which FSDP would not shard, and the student has {own:,}; use DDP, or "
            "choose a method that keeps less"
        )


def check_sharded_teacher(world: int, compiled: bool, cached: bool) -> None:
    """Raise where a teacher cannot be sharded."""
    if world == 1:
        raise ValueError(
            "shard_teacher: divides the teacher among processes, and this run has one; start several with torchrun or "
            "accelerate launch, or leave shard_teacher out"
        )
    if compiled or cached:
        other = "compile_teacher" if compiled else "teacher_cache"
        why = "compiles" if compiled else "runs on the first rank alone"
        raise ValueError(
            f"shard_teacher: cannot be combined with {other}, which {why} a whole teacher; leave one of them out"
        )


def shard(teacher: nn.Module, device: torch.device) -> nn.Module:
    """FSDP2, in place: a rank keeps its part of each layer on the device, and gathers a layer while it runs. What is in no
    layer, embeddings and head, is whole on each rank from the first forward on: a loss may read the head after the forward."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in teacher.get_submodule(layer_list(teacher)):
        fully_shard(layer, mesh=mesh)
    return fully_shard(teacher, mesh=mesh, reshard_after_forward=False).to(device)


def optimizer_beside(optimizer, groups: list[dict]):
    """An optimizer of the same kind for `groups`, which are replicated: it steps with the other, at its learning rate."""
    beside = type(optimizer)(groups)

    def step(*_) -> None:
        for group in beside.param_groups:
            group["lr"] = optimizer.param_groups[0]["lr"]
        beside.step()

    optimizer.register_step_post_hook(step)
    return beside


def of_the_host(group):
    """A group of the same ranks for numbers that the host reads: no device has to be waited for."""
    return group if dist.get_backend(group) == "gloo" else dist.new_group(backend="gloo")


def begin_alike(method: nn.Module, group) -> None:
    """The first rank's parameters and buffers, on every rank."""
    if group is not None:
        for x in method.state_dict().values():
            dist.broadcast(x, 0, group=group)


def pad_alike(samples: list[dict], pad_id: int, side: str, group) -> None:
    """Pad micro-batch i of each rank to the longest of all ranks, in place, as one process pads the batch of all of them.

    samples: the micro-batches of a step; their tensors [B, S] are padded on `side` ("left" or "right").
    """
    shapes = torch.tensor([[x["input_ids"].shape[1], len(x["input_ids"]), -len(x["input_ids"])] for x in samples])
    dist.all_reduce(shapes, dist.ReduceOp.MAX, group=group)
    for x, (longest, most, negated_least) in zip(samples, shapes.tolist(), strict=True):
        if most != -negated_least:
            raise ValueError(
                f"train_dataset: the ranks hold between {-negated_least} and {most} examples in one micro-batch, and this method "
                "compares the examples of all ranks; leave accelerator_config's even_batches at True, or drop the last batch "
                "(dataloader_drop_last)"
            )
        ids = x["input_ids"]
        missing = longest - ids.shape[1]
        if missing == 0:
            continue
        x.setdefault("attention_mask", torch.ones_like(ids))
        fills = {**FILLS, "input_ids": pad_id}
        for name, column in list(x.items()):
            if isinstance(column, torch.Tensor) and column.shape == ids.shape:
                place = (missing, 0) if side == "left" else (0, missing)
                x[name] = F.pad(column, place, value=fills.get(name, 0))
