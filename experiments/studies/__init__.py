"""Studies: each file states a question, its members, and the claims registered before running, as `get_study(arg)`."""
