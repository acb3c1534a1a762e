"""What a run would take on machines that nobody has paid for yet: memory, time, and where both go. Tested by `tests/planner`."""
