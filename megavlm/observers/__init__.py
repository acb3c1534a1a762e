"""What watches training and is handed in: instruments, drawings."""
