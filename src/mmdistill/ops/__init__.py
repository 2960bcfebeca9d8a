"""Hand-tuned kernels, apart from the models that call them. Each docstring has the measurement that justifies it."""
