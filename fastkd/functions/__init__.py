"""The public functions, one file per stem; fastkd.functional is where they are imported from."""
