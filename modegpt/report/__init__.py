"""One record for the eye: a table for the terminal, two pictures."""
