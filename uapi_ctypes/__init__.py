"""The KVM and TDX user-space ABI as ctypes: numbers, structures, one method per ioctl. Standard library only.

Two dialects live side by side: `mainline` (Linux 6.16 and later) and `v17` (the posting of November 2023).
Nothing here decides anything: policy belongs to the layers above.
"""
