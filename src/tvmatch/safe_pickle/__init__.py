"""Pickles and `torch.save` files, read without importing or calling anything that they name."""
