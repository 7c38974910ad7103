"""Pretrained weights in and out: safetensors, streamed shard by shard."""
