"""Makes the embedded world again: the corpus, the tasks and the trained models. See ``train``."""
