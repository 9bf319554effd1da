"""Cost of training and generation: operations, bytes and time, estimated and measured."""

MIB, GIB = 2**20, 2**30
