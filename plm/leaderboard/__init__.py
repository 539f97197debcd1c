"""Comparisons of methods: rows to fit, the cost of a run, results, tables, pictures, and what W&B shows of them."""
