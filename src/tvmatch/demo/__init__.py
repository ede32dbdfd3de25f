"""A web page that shows samples of a trained model."""
