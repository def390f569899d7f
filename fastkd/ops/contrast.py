"""A query against a bank of negatives (InfoNCE, NCE): which implementation runs."""

from torch import Tensor

from fastkd import backends
from fastkd.reference import contrast as reference


def info_nce(query, positive, bank, index, inverse_temperature, exclude, scale, backend) -> Tensor:
    """InfoNCE per query, [B]."""
    backends.choose("contrast", backend, query)
    with backends.full_precision(query):
        return reference.info_nce(query, positive, bank, index, inverse_temperature, exclude, scale)


def nce(query, bank, index, n_data, temperature, z, backend) -> Tensor:
    """NCE per query, [B]."""
    backends.choose("contrast", backend, query)
    with backends.full_precision(query):
        return reference.nce(query, bank, index, n_data, temperature, z)
