"""A web page to try a tokenizer and its generator: `titok demo`."""
