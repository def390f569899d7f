"""A query against a bank of negatives (InfoNCE, NCE), its sampling and its bank: which implementation runs."""

from torch import Tensor

from fastkd import backends
from fastkd.reference import contrast as reference
from fastkd.reference import contrast_bank as bank_reference


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


def partition(query, bank, index, n_data, temperature, z, backend) -> Tensor:
    """NCE's normaliser: z if it is set, else this batch's, []."""
    backends.choose("contrast", backend, query)
    with backends.full_precision(query):
        return reference.partition(query, bank, index, n_data, temperature, z)


def sample_negatives(index, count, n_data, labels, order, bounds, state, replacement, backend) -> Tensor:
    """Ids of other labels, [B, count]."""
    backends.choose("contrast", backend, index)
    return bank_reference.sample_negatives(index, count, n_data, labels, order, bounds, state, replacement)


def update_bank(bank, index, rows, momentum, backend) -> None:
    """Move the bank's rows towards the new ones, in place."""
    backends.choose("contrast", backend, bank)
    with backends.full_precision(bank):
        bank_reference.update_bank(bank, index, rows, momentum)
