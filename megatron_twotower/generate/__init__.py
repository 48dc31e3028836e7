"""Text from an exported two-tower folder."""
