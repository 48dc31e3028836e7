"""Estimates of memory, traffic and time of a layout, before any GPU is used."""
