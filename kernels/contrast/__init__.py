from .bank import sample_negatives, update_bank
from .loss import info_nce_bank_bwd, info_nce_fwd, nce_fwd

__all__ = ["info_nce_bank_bwd", "info_nce_fwd", "nce_fwd", "sample_negatives", "update_bank"]
