"""Folders of images: what lies in them, and what the places of the files say of splits and classes."""
