"""Corpora: text is prepared into shards, and shards are read as batches in the order of a run."""
