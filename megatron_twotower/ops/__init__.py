"""The operations of the two streams.

Each has a reference implementation, `*_ref`, that computes the same in the simplest way.
"""
