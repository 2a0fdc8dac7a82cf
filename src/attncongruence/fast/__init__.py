"""The same losses from queries and keys, in linear memory: no map of image by image is built."""
