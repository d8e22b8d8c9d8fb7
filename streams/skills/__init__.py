"""The embedded stream of word skills."""
