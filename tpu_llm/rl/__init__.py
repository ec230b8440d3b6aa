"""Reinforcement learning: the policy writes, rewards judge, advantages weigh, and `train.loop` steps."""
