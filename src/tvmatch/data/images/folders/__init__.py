"""Folders of images: their files, splits and classes."""
