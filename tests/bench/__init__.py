"""Speed is a claim too: each module here measures one, against a named peer, interleaved, and prints medians."""
