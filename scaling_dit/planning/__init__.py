"""Plans a run ahead of time for unattached TPUs: the memory it needs, and the best possible speed."""
