"""Where tensors live: the mesh, the rule tables, and the hosts that share it."""
