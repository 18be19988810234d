"""Data: `problems` and `sources` and `synthetic` problems, a run's `folder`, the files of `checkpoints`."""
