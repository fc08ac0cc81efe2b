"""Prompts as arrays of token ids."""

from diffusion_jax.text.tokenizer import ClipTokenizer

__all__ = ['ClipTokenizer']
