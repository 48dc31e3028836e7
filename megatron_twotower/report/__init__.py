"""The report of a run: it reads the run folder, prints a summary, and writes one HTML page."""
