"""KVM's TDX side: sub-commands, entry, TDVMCALL."""
