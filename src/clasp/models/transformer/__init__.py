"""Our own transformers: blocks, image and text encoders, convolutional stems and branches."""
