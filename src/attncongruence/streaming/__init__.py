"""The losses in linear memory: from queries and keys, without the map of image by image."""
