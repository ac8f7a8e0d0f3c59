"""What is soldered on the board: memory, registers, logical processors, keys."""
