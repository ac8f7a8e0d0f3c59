"""What is sent to a lab host and runs there: one file each, standard library only, Python 3.7 or newer."""
