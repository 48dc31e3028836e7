"""Generation of text with an exported two-tower folder."""
