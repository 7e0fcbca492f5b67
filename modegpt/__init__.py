"""MoDeGPT: modular decomposition of large language models, reproduced and measured."""
