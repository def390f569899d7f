"""torchdistill's losses that fastkd's kernels carry: the same classes, arguments, attributes and results.

`register()` puts them into torchdistill's registry under the names of the originals, so that a configuration with
`key: 'KDLoss'` stays as it is. In `KDLoss` alpha is the weight of the labels, and T² multiplies the soft term only where
there is a hard one; both are torchdistill's, and neither is `fastkd.HintonKDLoss`'s.
"""

import torch
from torchdistill.losses import mid_level

from fastkd import compat, functional
from fastkd.compat import soft_labels


def register() -> compat.patch:
    """Registers these classes in torchdistill in place of its own, until `.undo()` or the end of a `with` block.

    Example:
        >>> registered = fastkd.compat.torchdistill.register()  # doctest: +SKIP
        >>> print(registered)  # doctest: +SKIP
        >>> registered.undo()  # doctest: +SKIP
    """
    return compat.patch("torchdistill")


class _SoftLabels:
    """The forward of KDLoss and LogitStdKDLoss, which differ in what they do to the logits first."""

    def forward(self, student_io_dict, teacher_io_dict, targets=None, *args, **kwargs):
        student_logits = student_io_dict[self.student_module_path][self.student_module_io]
        teacher_logits = teacher_io_dict[self.teacher_module_path][self.teacher_module_io]
        if self.reduction not in soft_labels.REDUCTIONS or not soft_labels.takes(student_logits, teacher_logits):
            return super().forward(student_io_dict, teacher_io_dict, targets, *args, **kwargs)
        sides = self.prepared(student_logits), self.prepared(teacher_logits)
        soft_loss = soft_labels.kl_div(*sides, self.temperature, self.reduction)
        if self.alpha is None or self.alpha == 0 or targets is None:
            return soft_loss
        hard_loss = self.cross_entropy_loss(student_logits, targets)
        return self.alpha * hard_loss + self.beta * self.temperature**2 * soft_loss

    def prepared(self, logits):
        return logits


class KDLoss(_SoftLabels, mid_level.KDLoss):
    """Hinton's loss: alpha · CE + beta · T² · KL, and KL alone, without T², where alpha is None or 0 or no targets came."""


class LogitStdKDLoss(_SoftLabels, mid_level.LogitStdKDLoss):
    """The same for logits that are standardised first (Sun et al., CVPR 2024)."""

    def prepared(self, logits):
        return self.standardize(logits)


class SKDInstanceLoss(mid_level.SKDInstanceLoss):
    """The instance-wise term of Streamlined KD: KL, or with mode "code" T² KL of the less confident half of the batch."""

    def forward(self, student_io_dict, teacher_io_dict, *args, **kwargs):
        student_logits = student_io_dict[self.student_module_path][self.student_module_io]
        teacher_logits = teacher_io_dict[self.teacher_module_path][self.teacher_module_io]
        if not soft_labels.takes(student_logits, teacher_logits):
            return super().forward(student_io_dict, teacher_io_dict, *args, **kwargs)
        if self.mode == "paper":
            return soft_labels.kl_div(student_logits, teacher_logits, self.temperature, "batchmean")
        confidence = teacher_logits.detach().softmax(dim=1).amax(dim=1)  # [B, ...]
        unsure = confidence <= confidence.quantile(0.5)
        student, teacher = (x.movedim(1, -1) for x in (student_logits, teacher_logits))
        loss = functional.divergence(student, teacher, temperature=self.temperature, mask=unsure, reduction="sum")
        return soft_labels.like_softmax(loss / unsure.numel(), student_logits, teacher_logits)


class CRDLoss(mid_level.CRDLoss):
    """CRD against torchdistill's memories: the sum of both sides' NCE, of shape [1].

    `contrast_idx` must be among the inputs; version 1.1.5 cannot draw it, since its `draw` reads an attribute it never sets.
    """

    def forward(self, student_io_dict, teacher_io_dict, *args, **kwargs):
        student = student_io_dict[self.student_norm_module_path]["output"]
        teacher = teacher_io_dict[self.teacher_norm_module_path]["output"]
        given = student_io_dict[self.student_empty_module_path]["input"]
        if given.get("contrast_idx") is None or self.eps != 1e-7:
            return super().forward(student_io_dict, teacher_io_dict, *args, **kwargs)
        self.to(student.device)
        positives, index = (given[name].to(student.device) for name in ("pos_idx", "contrast_idx"))
        _, temperature, _, _, momentum = self.params.tolist()
        banks = self.memory_v2, self.memory_v1  # each side's vectors against the other side's memory
        size = {"temperature": temperature, "n_data": len(banks[0])}
        loss = 0.0
        for k, (query, bank) in enumerate(zip((student, teacher), banks, strict=True)):
            frozen = self.params[2 + k].clamp_min(0.0)  # -1 before the first call
            z = functional.nce_partition(query, bank, index, z=frozen, **size)
            self.params[2 + k] = z
            noise = {"temperature": temperature, "n_data": self.num_samples}
            loss = loss + functional.nce_loss(query, bank, index, z=z, **noise)
        with torch.no_grad():
            for bank, rows in ((self.memory_v1, student), (self.memory_v2, teacher)):
                functional.update_bank(bank, positives, rows.detach(), momentum=momentum)
        return loss.reshape(1)
