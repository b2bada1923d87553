"""Real data as arrays: images by class, in three splits whose classes never meet."""

from fomaml_jax.datasets._few_pictures import Pictures, few_pictures
from fomaml_jax.datasets._glyphs import glyphs
from fomaml_jax.datasets._image_folder import image_folder
from fomaml_jax.datasets._omniglot import omniglot
from fomaml_jax.datasets._types import ImageClasses, Splits, digest

__all__ = [
    "ImageClasses",
    "Pictures",
    "Splits",
    "digest",
    "few_pictures",
    "glyphs",
    "image_folder",
    "omniglot",
]
