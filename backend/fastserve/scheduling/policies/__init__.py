"""Who runs first: a file for each policy, what they share, and the table of their names."""
