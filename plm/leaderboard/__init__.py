"""Comparisons of methods: rows to fit, the cost of a run, results, tables, pictures, what W&B shows, all runs."""
