"""Commands of the command line that are too long for `fastffn.cli`, which starts them."""
