"""The test harness: real servers, real workers and a journal of what their tasks did."""
