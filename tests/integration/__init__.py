"""The library against real servers, below and at the edge of whole workers."""
