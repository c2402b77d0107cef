"""Evaluation tasks, one module each; `evaluation/config.py` lists them."""
