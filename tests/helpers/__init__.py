"""What tests share: small models, corpora, runs, and stand-ins."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
