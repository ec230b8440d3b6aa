"""The parts a model is made of: small NNX modules whose parameters are declared by their dims."""
