"""Experiments: each file states one run, as `get_config(arg)`."""
