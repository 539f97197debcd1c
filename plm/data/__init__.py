"""Pairs in, batches out: schema, sources, splits, feature cache, collation and the datamodule."""
