"""Objects to bytes and back, also those that the other side cannot import."""
