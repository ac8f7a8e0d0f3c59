"""What `make bench` runs: every figure a ratio to a bound or to the real kernel, within one run."""
