"""SEAMCALL leaf functions, one file each."""
