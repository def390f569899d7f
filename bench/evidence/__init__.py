"""For those who develop fastkd, not in the wheel: the run on a GPU, the targets, and what writes the README's figures."""
