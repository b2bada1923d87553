"""Real data as arrays: images by class, rows by group, in three splits that never meet."""

from fomaml_jax.datasets._few_pictures import Pictures, few_pictures
from fomaml_jax.datasets._few_rows import FewRows, few_rows
from fomaml_jax.datasets._glyphs import glyphs
from fomaml_jax.datasets._image_folder import image_folder
from fomaml_jax.datasets._omniglot import omniglot
from fomaml_jax.datasets._table import FURTHEST, Table, table
from fomaml_jax.datasets._types import Groups, GroupSplits, ImageClasses, Splits, digest

__all__ = [
    "FURTHEST",
    "FewRows",
    "GroupSplits",
    "Groups",
    "ImageClasses",
    "Pictures",
    "Splits",
    "Table",
    "digest",
    "few_pictures",
    "few_rows",
    "glyphs",
    "image_folder",
    "omniglot",
    "table",
]
