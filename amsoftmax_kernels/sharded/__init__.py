"""The head sharded over the classes: its module, its autograd function, who holds which classes, and which are drawn."""
