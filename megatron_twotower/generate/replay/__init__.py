"""Replays of mask diffusion: the recording of a generation, and the page that plays it."""
