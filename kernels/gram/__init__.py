from .launch import gram_bwd, gram_fwd

__all__ = ["gram_bwd", "gram_fwd"]
