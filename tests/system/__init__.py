"""The whole: the command line, signals, and what is printed in the README."""
