"""A server of one pipeline that speaks the protocol of nnsight's servers: ``dit-lens serve``."""
