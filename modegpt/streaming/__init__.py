"""Out-of-core compression: a checkpoint is read, decomposed and written layer by layer, whatever the model's size."""
