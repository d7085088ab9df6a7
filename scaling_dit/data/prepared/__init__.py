"""Data sets encoded once by `prepare`: their files, and the source that trains from them."""
