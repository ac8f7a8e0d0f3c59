"""TDCALL leaf functions, one file each."""
