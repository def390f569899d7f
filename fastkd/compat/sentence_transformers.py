"""Sentence Transformers' losses for distillation and retrieval on fastkd's kernels: the same classes and results.

`MultipleNegativesRankingLoss` and `DistillKLDivLoss` are computed by kernels; `MarginMSELoss` and `EmbedDistillLoss`, a
handful of numbers per example, are the originals. `fastkd.patch("sentence_transformers")` changes the classes in place.
"""

import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss, MarginMSELoss
from sentence_transformers.util import check_teacher_targets, cos_sim, dot_score
from torch import Tensor

from fastkd import compat, functional
from fastkd.compat import soft_labels

__all__ = ["DistillKLDivLoss", "EmbedDistillLoss", "MarginMSELoss", "MultipleNegativesRankingLoss"]

_MODULES = "sentence_transformers.sentence_transformer.losses."


def multiple_negatives_ranking(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
    """`MultipleNegativesRankingLoss.compute_loss_from_embeddings`.

    By kernels: cosine and dot-product similarity, every combination of directions but "doc_to_doc" without "doc_to_query",
    both partition modes. The original computes hardness weights, other similarities and gathering across devices.
    """
    directions = set(self.directions)
    hard = self.hardness_mode is not None and self.hardness_strength > 0
    if (
        len(embeddings) < 2
        or hard
        or self.gather_across_devices
        or self.similarity_fct not in (cos_sim, dot_score)
        or ("doc_to_doc" in directions and "doc_to_query" not in directions)
        or any(x.layout != torch.strided for x in embeddings)
    ):
        name = "MultipleNegativesRankingLoss.compute_loss_from_embeddings"
        return compat.original(_MODULES + "multiple_negatives_ranking", name)(self, embeddings, labels)
    dtype = embeddings[0].dtype
    if self.similarity_fct is cos_sim:
        embeddings = [F.normalize(x, dim=1) for x in embeddings]
    queries, *documents = embeddings
    # Candidates with the example's own number are its positive, or are no candidates; -1 is nobody's.
    own = torch.arange(len(queries), device=queries.device)
    nobody = own.new_full(((len(documents) - 1) * len(own),), -1)
    pools = [(torch.cat(documents), torch.cat([own, nobody]))]
    if "query_to_query" in directions:
        pools.append((queries, own))
    loss = _info_nce(queries, documents[0], pools, own, self.scale)  # [B]
    if "doc_to_query" in directions:
        pools = [(queries, own)]
        if "doc_to_doc" in directions:
            pools.append((torch.cat(documents), own.repeat(len(documents))))
        backward = _info_nce(documents[0], queries, pools, own, self.scale)
        # Both are log Z - positive with the same positive, so their log-sum-exp is that of the joint Z.
        joint = self.partition_mode == "joint"
        loss = torch.logaddexp(loss, backward) if joint else (loss + backward) / 2
    return loss.mean().to(dtype)


def _info_nce(anchors: Tensor, positives: Tensor, pools: list, own: Tensor, scale: float) -> Tensor:
    """log Z - positive of each anchor, over its positive and the candidates [K, D] of all pools with other numbers [K]."""
    if len(pools) == 1 and len(pools[0][0]) == len(own):
        return functional.info_nce_loss(anchors, positives, None, temperature=1.0 / scale, reduction="none")
    candidates, numbers = (torch.cat(x) for x in zip(*pools, strict=True))
    return functional.info_nce_loss(
        anchors, positives, candidates, temperature=1.0 / scale, exclude=(own, numbers), reduction="none"
    )


def distill_kl_div(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
    """`DistillKLDivLoss.compute_loss_from_embeddings`: T_s² KL between the softmaxes over the candidates' scores."""
    original = compat.original(_MODULES + "distill_kl_div", "DistillKLDivLoss.compute_loss_from_embeddings")
    few = not soft_labels.worth_it(labels.numel())  # one label for each score
    if few or len(embeddings) < 3 or labels.shape != (len(embeddings[0]), len(embeddings) - 1):
        return original(self, embeddings, labels)  # which also says what is wrong
    scores = torch.stack([self.similarity_fct(embeddings[0], other) for other in embeddings[1:]], dim=1)  # [B, n]
    labels = labels.detach()
    if not soft_labels.takes(scores, labels):
        return original(self, embeddings, labels)
    if not self._checked_teacher_scale:
        self._checked_teacher_scale = True
        targets = (labels / self.teacher_temperature).softmax(dim=1)
        check_teacher_targets(targets, labels, self.teacher_temperature, type(self).__name__)
    temperatures = {"temperature": self.student_temperature, "teacher_temperature": self.teacher_temperature}
    loss = functional.divergence(scores, labels, reduction="batchmean", **temperatures)
    return soft_labels.like_softmax(loss, scores, labels)


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    compute_loss_from_embeddings = multiple_negatives_ranking


class DistillKLDivLoss(losses.DistillKLDivLoss):
    compute_loss_from_embeddings = distill_kl_div


for ours in (MultipleNegativesRankingLoss, DistillKLDivLoss):
    ours.__doc__ = getattr(losses, ours.__name__).__init__.__doc__
