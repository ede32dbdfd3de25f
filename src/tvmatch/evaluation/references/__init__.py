"""The real images that samples are measured against: statistics from files, or computed from images."""
