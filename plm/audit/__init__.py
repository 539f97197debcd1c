"""Reports on preference pairs before anything is trained on them."""
