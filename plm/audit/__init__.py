"""Reports on preference pairs before anything is trained on them, and on files of what models got right."""
