"""A page to look at a trained model: what it computes, the page itself, and the server."""
