"""For data people: check, describe, look at, write, encode and simulate."""
