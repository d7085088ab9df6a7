"""Weights in and out of other code bases, by their own names."""

from scaling_dit.backbones.state_dicts import load_state_dict, to_state_dict

__all__ = ["load_state_dict", "to_state_dict"]
