"""One file per paper; each reads like its paper and calls only fastkd.functional."""
