"""Activations of the feed-forward network, by name."""

from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
