"""Checkpoints of other projects as networks of this one, read without executing anything."""
