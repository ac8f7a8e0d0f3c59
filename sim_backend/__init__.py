"""A simulated TDX host: CPU, TDX module and KVM, answering as the real ones do."""
