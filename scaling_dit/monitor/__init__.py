"""What a run reports while it trains: metrics, the progress line, goodput and profiles."""
