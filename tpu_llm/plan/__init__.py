"""Knowing a run before it runs: the program that the compiler makes of it, read and counted."""
