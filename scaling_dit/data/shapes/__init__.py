"""Built-in scenes of coloured shapes: images, captions, questions, and the oracle that answers them from pixels."""
