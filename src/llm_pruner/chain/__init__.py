"""A model as a chain of blocks that can be run one at a time, so that memory holds one."""
