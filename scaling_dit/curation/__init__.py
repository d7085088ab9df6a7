"""Jobs over whole data sets: filter, stats, caption and prepare."""
