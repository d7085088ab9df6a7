"""What metrics read from images: networks with their weights, preparation of pixels, statistics of features."""
