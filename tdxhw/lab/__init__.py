"""Lab hosts: inventory, SSH, leases, doctor."""
