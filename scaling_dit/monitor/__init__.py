"""What a run tells while it runs: metric writers and the progress line."""
