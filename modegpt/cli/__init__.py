"""The command line: compose, check, call. The only place that knows Hydra."""
