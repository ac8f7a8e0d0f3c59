"""Validate a kernel build on a lab machine: install, boot once, prove, run, judge, roll back."""
