"""Makes the embedded world again: the corpus, the tasks and the two trained models. See ``train``."""
