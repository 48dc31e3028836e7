"""The command line: one module per command, each with its options and the function that runs it."""
