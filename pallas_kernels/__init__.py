"""The few kernels that attention stands on, and what they share.

A kernel family is a folder with the same rooms: `__init__.py` is the public function with its
checks, the choice of implementation and the derivative rule; `inputs.py` says what implementations
are called with; `reference.py` is the definition, and each other file an implementation.
"""
