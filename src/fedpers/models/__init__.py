"""Pretrained backbones, adapters, and the assets they come from."""
