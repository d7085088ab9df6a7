"""What a run keeps: its folder, its checkpoints, its averages."""
