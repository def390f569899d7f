"""What a method learns: trained with the student, equal on all ranks, saved in every checkpoint, and never part of the student."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from . import ranks
from .methods import Combined

STATE = "fastkd_method"


class Learned:
    """The part of DistillTrainer that trains and keeps the method's parameters and buffers."""

    def create_optimizer(self, model=None):
        fresh = self.optimizer is None
        super().create_optimizer(model)
        learned = [] if self.method is None else list(self.method.parameters())
        if fresh and learned:
            shared = {k: v for k, v in self.optimizer.defaults.items() if k not in ("params", "weight_decay")}
            decayed = [p for p in learned if p.dim() > 1]
            biases = [p for p in learned if p.dim() <= 1]
            groups = [
                {"params": group, "weight_decay": decay, **shared}
                for group, decay in ((decayed, self.args.weight_decay), (biases, 0.0))
                if group
            ]
            if self.is_fsdp_enabled:  # accelerate's optimizer takes the parameters of the sharded model only
                self._replicated = ranks.optimizer_beside(self.optimizer, groups)
            else:
                for group in groups:
                    self.optimizer.add_param_group(group)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._step_begins and self.method is not None:
            self.method.zero_grad()  # Trainer zeroes the gradients of its model, not those of its optimizer
        loss = super().training_step(model, inputs, num_items_in_batch).nan_to_num(0.0, 0.0, 0.0)  # a skipped step's
        self._step_begins = self.accelerator.sync_gradients
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1 and self.method is not None:
            for parameter in self.method.parameters():  # DDP averages the student's gradients; these are not in it
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.accelerator.num_processes
        return loss

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.args.should_save and self.method is not None:
            save_method(self.method, output_dir)
            if self._replicated is not None:
                torch.save(self._replicated.state_dict(), Path(output_dir) / f"{STATE}_optimizer.pt")
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._replicated is not None:
            saved = torch.load(Path(checkpoint) / f"{STATE}_optimizer.pt", map_location="cpu", weights_only=True)
            self._replicated.load_state_dict(saved)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.method is not None:
            load_method(self.method, resume_from_checkpoint)


def save_method(method: Combined, folder) -> None:
    """fastkd_method.safetensors: parameters and buffers; fastkd_method.json: which methods they belong to."""
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in method.state_dict().items()}
    save_file(tensors, Path(folder) / f"{STATE}.safetensors")
    (Path(folder) / f"{STATE}.json").write_text(
        json.dumps({"methods": list(method.methods), "weights": method.weights})
    )


def load_method(method: Combined, folder) -> None:
    path = Path(folder) / f"{STATE}.json"
    if not path.exists():
        raise ValueError(
            f"resume: {folder} has no {path.name}, so what the method had learned is lost; resume elsewhere"
        )
    saved = json.loads(path.read_text())
    if saved["methods"] != list(method.methods):
        raise ValueError(
            f"resume: {folder} was written by method {' + '.join(saved['methods'])}, and this run is "
            f"{' + '.join(method.methods)}; resume with the same, or choose another output folder"
        )
    method.load_state_dict(load_file(path.with_suffix(".safetensors")))
