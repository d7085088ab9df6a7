"""Published weights: where they lie, reading their files, and tables that map their names to ours."""
