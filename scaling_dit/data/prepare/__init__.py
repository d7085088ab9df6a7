"""Before training: raw images and captions are filtered, counted, captioned and encoded."""
