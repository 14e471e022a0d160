"""How a model's state is spread over workers, behind one interface."""
