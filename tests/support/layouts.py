"""The mesh layouts on eight devices, and fields of a tiny backbone of every family, that tests share."""

TRANSFORMER = {"hidden": 32, "depth": 2, "heads": 2}
UNET = {"channels": 32, "channel_mult": (1, 2), "res_blocks": 1, "head_dim": 16}
FIELDS = {
    "uvit": TRANSFORMER,
    "pixart": TRANSFORMER,
    "large_dit": TRANSFORMER,
    "next_dit": TRANSFORMER,
    "unet": UNET | {"transformer_depth": (0, 2)},
    "unet_if": UNET | {"attention_levels": (1,)},
}
LAYOUTS = {
    "DP8": {"data": 8},
    "FSDP8": {"data": 1, "fsdp": 8},
    "DP2xFSDP4": {"data": 2, "fsdp": 4},
    "FSDP4xTP2": {"data": 1, "fsdp": 4, "tensor": 2},
    "FSDP2xCTX2xTP2": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
    # Three axes at once, where XLA erred.
    "DP2xFSDP2xTP2": {"data": 2, "fsdp": 2, "tensor": 2},
}
