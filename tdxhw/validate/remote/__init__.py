"""What validation sends to a lab host and runs there: one file each, standard library only."""
