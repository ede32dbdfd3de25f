"""Pickles and `torch.save` files, read without importing or calling anything that they name.

`unpickler.restricted_load` uses Python's implementation of `pickle.Unpickler`, and `torch.load` with a
`pickle_module`. Each name in a file becomes an inert class (`inert`) or one of the functions in
`unpickler.STAND_INS`, which check their arguments. A hostile file can exhaust memory or the stack, but it
cannot run code, and no tensor or array reads memory outside its own data.
"""
