"""The two-stream operations. Each has a slow twin, `*_ref`, that says in the plainest way what it computes."""
