"""Published tables, run again: their rows as data, the chain that measures them, and the comparison."""
