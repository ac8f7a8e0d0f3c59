"""KVM's second-level page tables: mirror EPT, shared EPT, faults, zaps."""
