"""Published weights: finds them, reads their files, and maps their names to ours by tables."""
