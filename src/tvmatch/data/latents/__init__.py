"""Latents of images: the autoencoder, encoding, shards on disk, and the data set that training reads."""
