"""The networks as the papers define them: tokenizer, generator, MaskGIT-VQGAN, and their layers."""
