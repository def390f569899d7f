from .bank import sample_negatives, update_bank
from .loss import info_nce_fwd, info_nce_softmax, nce_fwd

__all__ = ["info_nce_fwd", "info_nce_softmax", "nce_fwd", "sample_negatives", "update_bank"]
