"""One write-once JSON record a run: what it was, what decided it, where it ran, what it measured."""
