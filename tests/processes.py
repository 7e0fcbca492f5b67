"""Processes that a test starts, measures or kills: children of one that has run nothing.

A child of the test process itself would have its locks and its memory, and none of the threads that hold or serve them.
"""

import multiprocessing

CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["torch", "transformers", "modegpt.run"])
