"""PNG files: grids of images, points in the plane, training curves."""

from tvmatch.pictures.images import image_grid, save_png
from tvmatch.pictures.plots import points_picture, points_square, training_curves

__all__ = ["image_grid", "points_picture", "points_square", "save_png", "training_curves"]
