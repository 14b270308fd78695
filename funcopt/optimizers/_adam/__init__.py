"""What Adam and AdamW share: kernels, and the derivative of a step."""
