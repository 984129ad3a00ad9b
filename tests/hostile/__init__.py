"""What nobody should send, store or name: nothing crashes, leaks into another key, or is executed."""
