"""The ops, one file each: schema, fake, dispatch to a backend, autograd. `reference` is the oracle."""
