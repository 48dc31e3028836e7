"""Shared by tests: small models, corpora, runs, and stand-ins for devices and packages."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
