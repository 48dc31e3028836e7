"""The operations of `ops` in Triton. Importing a module of this folder imports triton."""
