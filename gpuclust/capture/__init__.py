"""Images to activations: what a network makes of every image, layer by layer, on its device."""
