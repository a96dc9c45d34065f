"""How the matrix of pairs is computed, by name."""

from typing import Literal

Layout = Literal["auto", "global", "rows", "tiles", "ring"]
