"""The maths that decides speed, each with a plain reference that it must equal."""
