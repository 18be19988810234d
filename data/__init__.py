"""Data: `problems` reads and writes, `sources` fetches, `synthetic` makes problems, `folder` keeps what a run has made."""
