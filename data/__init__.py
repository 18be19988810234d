"""Data: `problems` reads and writes, `sources` fetches, `synthetic` makes problems, `make_tiny` makes the tiny checkpoint."""
