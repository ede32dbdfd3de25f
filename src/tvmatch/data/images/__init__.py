"""Images: where they are, how they are read, and the data set that training reads."""
