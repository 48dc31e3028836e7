"""From raw text to batches: prepared shards, the order of a run, and what it reads."""
