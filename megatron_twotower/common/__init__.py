"""What every other folder may use; nothing here imports the rest of the package."""
