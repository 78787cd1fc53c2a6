"""One file a model family: what sets it apart from the plain decoder, as data."""
