"""KVM as user space sees it: ioctls, memory slots, guest_memfd, exits."""
