"""What titok is measured against: TiTok as the official code computes it, and DiT-XL/2 of diffusers."""
