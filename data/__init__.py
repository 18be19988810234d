"""Problems, downloads, checkpoint files, run folders, processes and the terminal: see README.md."""

import sys

if sys.version_info < (3, 11):
    sys.exit("this needs Python 3.11 or later")


def hide_interrupt(kind, error, traceback) -> None:
    """Say one word for Ctrl-C while torch is still being imported, not a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = hide_interrupt
