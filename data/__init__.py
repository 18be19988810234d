"""Problems (`problems`, `sources`, `synthetic`), a run's `folder`, the files of `checkpoints`."""
