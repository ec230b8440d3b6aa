"""What a step minimises: each objective is one dataclass with one method."""
