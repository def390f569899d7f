"""FCD (Huang, Guo, Wang; NeurIPS 2023): alpha · token + beta · sequence + gamma · random, relations among the tokens of the
last layers ("last") or of all of the student's ("uniform"). The released loss has no task term: relations first, then plain
fine-tuning, `share` of training for the former.

Args:
    layers: "last", or "uniform": student layer l learns from teacher layer l·M/N.
    teacher_layer: The teacher's layer that the student's last one learns from, counted from 1. None: its last.
"""

from fastkd.losses.fcd import FCDLoss

from .base import Method, Term, layer_number, uniform_map


class FCD(Method):
    hidden, features_only, one_shape, stages = True, True, True, ("relations", "task")

    def __init__(self, setup, alpha=1.0, beta=1.0, gamma=0.0, K=128, layers="last", teacher_layer=None, share=0.5):
        super().__init__(setup, share)
        if layers not in ("last", "uniform"):
            raise ValueError(f"fcd: layers must be 'last' or 'uniform', got {layers!r}")
        last = [(setup.student.layers, layer_number("fcd", teacher_layer, setup.teacher.layers))]
        pairs = uniform_map(setup, "fcd") if layers == "uniform" else last
        self.read = dict(zip(("student", "teacher"), zip(*pairs, strict=True), strict=True))
        weights = {"token": alpha, "sequence": beta, "random": gamma}
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        options = {"K": K, "process_group": setup.process_group}
        self.losses = {name: FCDLoss(*(float(name == other) for other in weights), **options) for name in self.weights}

    def forward(self, batch):
        if self.stage(batch.progress) == "task":
            return batch.fine_tune()
        student, teacher = ([getattr(batch, side).hidden[i] for i in self.read[side]] for side in self.read)
        values = {name: loss(student, teacher, batch.mask) for name, loss in self.losses.items()}
        of_batch = "batches", True  # the sequence level and the random relation couple the batch
        over = {"token": ("sequences", False), "sequence": of_batch, "random": of_batch}
        return {name: Term(value, self.weights[name], *over[name]) for name, value in values.items()}
