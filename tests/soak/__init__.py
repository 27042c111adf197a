"""Many processes, a long time, and servers that die; a short version of each, too."""
