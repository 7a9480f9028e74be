"""The ops, one file each: schema, fake, dispatch, autograd. `reference` is the oracle."""
