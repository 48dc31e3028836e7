"""Evaluation of exported folders: likelihoods, speed against quality, benchmark tasks."""
