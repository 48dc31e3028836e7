"""What an exported folder is worth: likelihoods, speed against quality, benchmark tasks."""
