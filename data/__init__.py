"""Problems, downloads, checkpoint files, run folders, processes and the terminal: see README.md."""
