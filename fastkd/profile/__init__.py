"""Where the time of a distillation step goes, as training runs it: `fastkd profile`."""
