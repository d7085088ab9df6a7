"""Experiments: each file states one run, or the runs of one study, as `get_config(arg)`."""
