"""A step of the loss beside other libraries'."""
