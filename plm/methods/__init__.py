"""One file, one paper: the personalisation methods."""
