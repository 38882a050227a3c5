"""Ours beside the peers on one machine: the same weights, prompts and threads, in rounds that take turns."""
